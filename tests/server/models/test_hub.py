"""Models of the hub: what is fetched (here from a local stand-in), and what is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from embedded import MODEL_FOLDER
from server.errors import ModelMismatch
from server.models.hub import HubModel, chosen_files
from server.models.hub import fetch as fetch_model
from server.models.loading import load_model
from server.service.hosting import host
from server.service.one_shot import GUESSED_COSTS
from server.settings import Settings
from tests.server.models.fake_hub import COMMIT, Hub, serving

FETCH = """
import json, os, sys, time
# Of a hub that is gone the client asks six times, with 23 seconds between.
time.sleep = lambda _: None
from server.errors import ModelMismatch, WeftError
from server.models.hub import HubModel, fetch

def check(folder):
    if os.environ["REFUSES"]:
        raise ModelMismatch(f"{sorted(os.listdir(folder))} is of no family")

for text in sys.argv[1:]:
    told = []
    try:
        folder = fetch(
            HubModel.of(text),
            half=True,
            check=check,
            on_progress=lambda *read: told.append(read),
            replaced=os.environ["REPLACED"].split(),
        )
        print(json.dumps({"folder": str(folder), "told": told[-1:]}))
    except WeftError as error:
        print(json.dumps({"error": error.message}))
"""

Fetch = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a repository, with many files that must not be fetched."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("weft"))
    index = json.loads((folder / "model_index.json").read_text())
    unused = {"safety_checker": ["stable_diffusion", "Checker"], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | unused))
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, unet / "diffusion_pytorch_model.fp16.safetensors")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"):
        (unet / name).write_text("pickle")
    (unet / "modeling.py").write_text("code")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_text("large")
    (folder / "tiny.safetensors").write_text("all in one file")
    return folder


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Fetch models with the test's own cache."""

    def run(
        hub: Hub, *models: str, token: str = "", refuses: str = "", replaced: str = ""
    ) -> list[dict[str, Any]]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token}
        # As the documented command for the image says that the network is allowed.
        own |= {"HF_HUB_OFFLINE": "0", "REFUSES": refuses, "REPLACED": replaced}
        command = [sys.executable, "-c", FETCH, *models]
        done = subprocess.run(command, env=kept | own, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_a_model_is_fetched_once_and_goes_on_where_it_was_cut(
    repository: Path, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    with serving(Hub(repository, cut=name)) as hub:
        [fetched] = fetch(hub, "org/tiny@v1")
    assert sorted(hub.sent) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        name,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    sizes = {file: (repository / file).stat().st_size for file in hub.sent}
    # Nothing was sent twice, not even of the file whose first answer was cut.
    assert hub.sent == sizes
    [[done, total]] = fetched["told"]
    assert done == total == sum(sizes.values()) - sizes["model_index.json"]
    folder = Path(fetched["folder"])
    assert folder.name == COMMIT
    # Without the hub, the cache is used, and what is incomplete is reported.
    assert fetch(hub, "org/tiny@v1", f"org/tiny@{COMMIT}") == 2 * [
        {"folder": str(folder), "told": []}
    ]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = Settings(models=("org/tiny@v1",), dtype="bfloat16")
    hosted = host(settings, guessed_costs=GUESSED_COSTS)
    hosted.engine.stop(0)
    assert list(hosted.models) == ["tiny"]
    theirs = load_model(MODEL_FOLDER, name="m", device="cpu", dtype="bfloat16").modules()["unet"]
    ours = hosted.models["tiny"].modules()["unet"].state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.state_dict().items())
    # Full precision needs other files.
    with pytest.raises(ModelMismatch, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        host(Settings(models=("org/tiny@v1",), dtype="float32"))
    (folder / name).unlink()
    other = MODEL_FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    given = settings.model_copy(update={"denoisers": (f"tiny={other}",), "cache": tmp_path})
    host(given, guessed_costs=GUESSED_COSTS).engine.stop(0)
    [missing] = fetch(hub, "org/tiny@v1")
    # It was not told to stay offline.
    lacking = "'org/tiny@v1' is not complete in the cache, and the hub cannot be reached; there is"
    assert lacking in missing["error"]


def test_a_file_that_a_loss_of_power_cut_in_the_cache_is_fetched_again(
    repository: Path, fetch: Fetch
) -> None:
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    with serving(Hub(repository)) as hub:
        [fetched] = fetch(hub, "org/tiny")
        file = Path(fetched["folder"]) / name
        os.truncate(file, 1000)
        hub.sent.clear()
        [again] = fetch(hub, "org/tiny")
    assert again["folder"] == fetched["folder"]
    assert file.read_bytes() == (repository / name).read_bytes()
    assert hub.sent.keys() == {name}
    os.truncate(file, 1000)
    [missing] = fetch(hub, "org/tiny")
    assert "'org/tiny@main' is not complete in the cache" in missing["error"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelMismatch, match=f"the disk of '{tmp_path}' is full"):
        fetch_model(HubModel("org/tiny", "main"), half=False, check=lambda _: None)


def test_what_cannot_be_fetched_says_why(repository: Path, fetch: Fetch) -> None:
    with serving(Hub(repository, token="hf_secret")) as hub:
        [gated] = fetch(hub, "org/tiny")
        unknown, gone, opened = fetch(hub, "org/none", "org/tiny@v2", "org/tiny", token=hub.token)
    assert "'org/tiny@main' is gated" in gated["error"]
    assert "'org/none@main' does not exist, or HF_TOKEN has no access" in unknown["error"]
    assert "'org/tiny' has no revision 'v2'" in gone["error"]
    assert Path(opened["folder"]).name == COMMIT


def test_what_is_refused_is_refused_before_more_than_its_index_is_fetched(
    repository: Path, fetch: Fetch
) -> None:
    with serving(Hub(repository)) as hub:
        [refused] = fetch(hub, "org/tiny", refuses="all")
    assert refused["error"] == "['model_index.json'] is of no family"
    assert hub.sent.keys() == {"model_index.json"}


def test_weights_that_others_take_the_place_of_are_not_fetched(
    repository: Path, fetch: Fetch
) -> None:
    with serving(Hub(repository)) as hub:
        [fetched] = fetch(hub, "org/tiny", replaced="unet")
        assert [name for name in hub.sent if name.startswith("unet")] == ["unet/config.json"]
    # Cached files are used without the hub.
    assert fetch(hub, "org/tiny", replaced="unet") == [{**fetched, "told": []}]


def test_of_weights_in_two_forms_one_is_fetched() -> None:
    shards = [f"unet/diffusion_pytorch_model{form}.safetensors" for form in FORMS]
    indices = [f"unet/diffusion_pytorch_model.safetensors.index{v}.json" for v in ("", ".fp16")]
    others = ["unet/pytorch_model.bin.index.json", "unet/config.json", "unet/deeper/x.json"]
    paths = [*shards, *indices, *others, "model_index.json", "vae/config.json"]
    half = chosen_files(paths, ["unet"], half=True)
    full = chosen_files(paths, ["unet"], half=False)
    assert set(half) == {"model_index.json", "unet/config.json", shards[1], shards[3], indices[1]}
    bfloat = [path.replace("fp16", "bf16") for path in paths]
    assert chosen_files(bfloat, ["unet"], half=True) == [p.replace("fp16", "bf16") for p in half]
    assert set(full) == {"model_index.json", "unet/config.json", shards[0], shards[2], indices[0]}


FORMS = ("-00001-of-00002", ".fp16-00001-of-00002", "-00002-of-00002", "-00002-of-00002.fp16")


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/name", HubModel("org/name", "main")),
        ("org/my.name-2@refs/pr/3", HubModel("org/my.name-2", "refs/pr/3")),
        ("name", None),
        ("/org/name", None),
        ("org/na..me", None),
        ("../name", None),
        ("a/b/c", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(text: str, model: HubModel | None) -> None:
    assert HubModel.of(text) == model

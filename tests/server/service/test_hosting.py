"""How a model is placed follows from the memory of its device."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import monotonic
from typing import Any

import pytest
import torch

from embedded import MODEL_FOLDER
from server.engine.preparation import PreparedForwards
from server.errors import ModelMismatch, ModelTooLarge
from server.http.native.models import card_of
from server.models.folder_cache import FolderCache
from server.models.memory import DeviceMemory
from server.models.placement import Offload, Placement
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of
from server.service import hosting
from server.service.model_shelf import ModelState
from server.service.named_weights import NamedWeights
from server.settings import Settings


def folders(settings: Settings) -> hosting._Folders:
    first = {"one": MODEL_FOLDER, "two": MODEL_FOLDER}
    return hosting._Folders(settings, first, NamedWeights(settings))


def needed(offload: Offload) -> int:
    return bytes_in_memory(MODEL_FOLDER, torch.float16, Placement(offload=offload))


def test_a_model_that_does_not_fit_on_a_gpu_is_streamed_and_counted_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(hosting, "attainable_bytes", lambda _: needed("none"))
    assert folders(Settings()).placement("one") == Placement()
    # The operator may allow less than there is.
    less = (needed("none") - 1) / 2**30
    small = folders(Settings(memory_gib=less))
    assert small.placement("one") == Placement(offload="all")
    assert small.bytes_of("one") == needed("all") < needed("none")
    told_not_to = folders(Settings(memory_gib=less, offload="none"))
    assert told_not_to.bytes_of("one") == needed("none")


def test_a_streamed_model_is_refused_before_it_is_read_where_the_host_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(hosting, "attainable_bytes", lambda _: needed("none") - 1)
    monkeypatch.setattr(hosting, "measure", lambda _: DeviceMemory(needed("all"), needed("all")))
    on_host = folders(Settings()).needs_on_host("one")
    assert on_host > needed("none") - needed("all")
    monkeypatch.setattr(hosting._Folders, "load_from_folder", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ModelTooLarge, match=f"needs {on_host} bytes of host memory"):
        hosting.host(Settings(models=(f"one={MODEL_FOLDER}",)))


def test_each_model_is_kept_in_the_bits_that_are_chosen_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.settings.missing_package", {}.get)
    chosen = folders(Settings(quantize=("int8", "two=none"), device="cpu"))
    assert chosen.placement("one") == Placement("int8")
    assert chosen.placement("two") == Placement()
    assert chosen.bytes_of("one") < chosen.bytes_of("two")


def test_a_name_in_quantize_that_no_model_has_is_refused_unless_it_may_come_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.settings.missing_package", {}.get)
    chosen = Settings(quantize=("none", "one=int8", "onne=int8"), models=(f"one={MODEL_FOLDER}",))
    with pytest.raises(ModelMismatch, match="quantize names the model 'onne'; there are one"):
        hosting.host(chosen)
    filled = chosen.model_copy(update={"models_folder": tmp_path})
    hosting._check_names(filled, ["one"])
    assert "quantize names the model 'onne'" in caplog.text


def test_a_model_is_given_the_autoencoder_that_is_set_for_it_and_for_no_other(
    tmp_path: Path,
) -> None:
    vae = tmp_path / "mine"
    shutil.copytree(MODEL_FOLDER / "vae", vae)
    chosen = Settings(vaes=(f"one={vae}",), tiny_vaes=(f"two={vae}",), device="cpu")
    one, two = (folders(chosen).load_from_folder(name, None) for name in ("one", "two"))
    assert (one.facts.vae, two.facts.vae) == ("mine", None)
    assert (one.facts.tiny_vae, two.facts.tiny_vae) == (None, "mine")
    assert one.tiny is None
    states = (
        ModelState("m", True, 0, model, 0, 0, 0.0, None, PreparedForwards()) for model in (one, two)
    )
    cards = [card_of(state) for state in states]
    assert [(card.vae, card.tiny_vae) for card in cards] == [("mine", None), (None, "mine")]
    assert bytes_of(two) > bytes_of(one)
    other = chosen.model_copy(update={"models": (f"two={MODEL_FOLDER}",)})
    with pytest.raises(ModelMismatch, match="vaes names the model 'one'; there are two"):
        hosting.host(other)


def test_a_folder_that_is_removed_while_it_is_read_is_not_named_to_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")

    def removed_first(*asked: Any) -> int:
        shutil.rmtree(folder)
        return bytes_in_memory(*asked)

    monkeypatch.setattr(hosting, "bytes_in_memory", removed_first)
    settings = Settings(models_folder=tmp_path)
    source = hosting._Folders(settings, {"one": folder}, NamedWeights(settings))
    with pytest.raises(ModelMismatch) as refused:
        source.needs("one")
    assert refused.value.message.startswith("model 'one' has no model_index.json")


@pytest.fixture
def readable_by_others() -> Generator[Path]:
    """A folder with the models `open` and `closed`, which a user other than root may look into."""
    with TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        for model in ("open", "closed"):
            (place / model).mkdir()
            (place / model / "model_index.json").write_text("{}")
        yield place
        place.chmod(0o755)


@contextmanager
def as_nobody() -> Generator[None]:
    """Without root's right to read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_model_folder_that_may_not_be_read_is_said_to_be_left_out(
    readable_by_others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (readable_by_others / "closed").chmod(0)
    with as_nobody():
        hosting._check_readable(readable_by_others)
        user = os.geteuid()
    [said] = caplog.messages
    closed = readable_by_others / "closed"
    assert said == f"{closed} is left out: user {user}, as whom the server runs, may not read it"


def test_a_link_to_where_nothing_may_be_read_is_said_to_be_left_out(
    readable_by_others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = readable_by_others / "closed"
    (place / "one").mkdir()
    (readable_by_others / "link").symlink_to(place / "one")
    place.chmod(0)
    with as_nobody():
        hosting._check_readable(readable_by_others)
    assert [said.partition(" is ")[0] for said in caplog.messages] == [
        str(place),
        str(readable_by_others / "link"),
    ]


def test_a_folder_of_models_that_may_not_be_read_is_refused(readable_by_others: Path) -> None:
    readable_by_others.chmod(0)
    with as_nobody(), pytest.raises(ModelMismatch, match=r"as whom the server runs, may not read"):
        hosting.host(Settings(models_folder=readable_by_others))


def test_a_named_folder_that_is_not_in_the_folder_of_models_was_never_there(tmp_path: Path) -> None:
    named = Settings(models=(str(tmp_path / "none"),), models_folder=tmp_path)
    with pytest.raises(ModelMismatch, match=r"model folder '.*/none' has no model_index.json"):
        hosting.host(named)


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(
        models=(f"one={MODEL_FOLDER}",),
        denoisers=(f"one={MODEL_FOLDER / 'unet' / 'diffusion_pytorch_model.safetensors'}",),
        cache=tmp_path / "file" / "cache",
    )
    with pytest.raises(ModelMismatch) as refused:
        hosting.host(settings)
    cache = str(tmp_path / "file" / "cache")
    assert refused.value.message == (
        f"cache is {cache!r}, which cannot be written to: Not a directory."
    )


def test_models_whose_disk_has_vanished_are_listed_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").symlink_to(MODEL_FOLDER)
    source = folders(Settings(models_folder=tmp_path))
    before = source.created()
    assert before.keys() == {"one", "two", "here"}

    def vanished(_: Settings) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Settings, "found_folders", vanished)
    assert source.created() == before


def test_a_model_s_prompts_need_no_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any word of a prompt might be the name of an embedding in the model's own folder."""
    monkeypatch.setattr("server.lookup.PATIENCE_S", 0.1)
    source = folders(Settings(embeddings=tmp_path))
    model = source.load_from_folder("one", None)
    answers = Event()
    monkeypatch.setattr(FolderCache, "of", lambda *_: answers.wait(60) and {})
    began = monotonic()
    assert [model.embeddings.named_in("a red circle") for _ in range(20)] == [()] * 20
    assert monotonic() - began < 10
    answers.set()

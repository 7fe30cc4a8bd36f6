"""A real server loads models of a folder on demand, and lists them as OpenAI's API does."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from server.engine.preparation import PreparedForwards
from server.errors import ModelMismatch
from server.http.native.models import CompilationCard, card_of
from server.models.hosted import HostedModel
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of
from server.service.hosting import Hosted, host
from server.service.model_shelf import MemoryBudget, ModelState
from server.service.one_shot import GUESSED_COSTS
from server.settings import Settings
from tests.server.full_ticks import full_ticks
from tests.server.http.small_server import SmallServer
from tests.server.toy_model import Toy, started

PATIENCE_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, thin_folder: Path) -> Path:
    """A folder of models: "one", "two" and "three" are a thin model, the rest are invalid."""
    made = tmp_path_factory.mktemp("models")
    for name in ("one", "two", "three"):
        (made / name).symlink_to(thin_folder)
    broken = made / "broken"
    shutil.copytree(thin_folder, broken, ignore=shutil.ignore_patterns("weft", "vae"))
    huge = made / "huge"
    shutil.copytree(thin_folder, huge, ignore=shutil.ignore_patterns("weft", "unet"))
    claim_a_tebibyte(huge / "unet" / "diffusion_pytorch_model.safetensors")
    return made


def claim_a_tebibyte(file: Path) -> None:
    """Write a safetensors file of one tensor, of which no byte takes room on the disk."""
    tensor = {"dtype": "F16", "shape": [2**39], "data_offsets": [0, 2**40]}
    header = json.dumps({"weight": tensor}).encode()
    file.parent.mkdir()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(header) + 2**40)


@pytest.fixture(scope="module")
def server(folder: Path, thin_folder: Path, young_garbage: None) -> Iterator[SmallServer]:
    """A server with memory for two of the models."""
    both = 2.2 * bytes_in_memory(thin_folder, torch.float32) / 2**30
    settings = Settings(models=(f"first={thin_folder}",), models_folder=folder, memory_gib=both)
    made = SmallServer(settings, host(settings, guessed_costs=GUESSED_COSTS))
    # The cost of forwards of an added model does not matter here.
    with full_ticks():
        made.start()
        made.wait(lambda: made.engine.ready)
        yield made
        made.stop()


@pytest.fixture(scope="module")
def client(server: SmallServer) -> Iterator[httpx2.Client]:
    url = f"http://127.0.0.1:{server.port}"
    with httpx2.Client(base_url=url, timeout=PATIENCE_S) as made:
        yield made


def picture(client: httpx2.Client, **fields: Any) -> NDArray[np.uint8]:
    body = {"prompt": "a red circle", "steps": 2, "seed": 5, "width": 64, "height": 64} | fields
    answer = client.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def refusal(client: httpx2.Client, model: str) -> tuple[int, dict[str, Any]]:
    answer = client.post("/v1/generate", json={"prompt": "x", "steps": 2, "model": model})
    return answer.status_code, answer.json()["error"]


def listed(client: httpx2.Client) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in client.get("/v1/models").json()["data"]}


def test_models_of_the_folder_come_and_go_as_requests_name_them(
    client: httpx2.Client, server: SmallServer, thin_folder: Path
) -> None:
    cards = listed(client)
    assert list(cards) == ["first", "broken", "huge", "one", "three", "two"]
    assert [name for name, card in cards.items() if card["loaded"]] == ["first"]
    expected = picture(client)
    assert np.array_equal(picture(client, model="one"), expected)
    assert np.array_equal(picture(client, model="two"), expected)
    cards = listed(client)
    assert [name for name, card in cards.items() if card["loaded"]] == ["one", "two"]
    [model, _] = server.app.state.service.ready_shelf().loaded()
    assert cards["one"]["memory_bytes"] == bytes_of(model)
    metrics = client.get("/metrics").text
    assert re.findall(r'weft_model_memory_bytes{model="(\w+)"}', metrics) == ["one", "two"]
    shown = {key: cards["one"][key] for key in ("device", "dtype", "attention", "loading")}
    assert shown == {"device": "cpu", "dtype": "float32", "attention": "sdpa", "loading": None}
    run = [cards["one"][key] for key in ("memory_format", "forward_rows", "recorded_rows")]
    assert run == ["channels_last", [], []]
    kept = [
        cards["one"][key] for key in ("quantization", "offload", "offloaded_bytes", "compilation")
    ]
    assert kept == ["none", "none", 0, None]
    # The default model is loaded again when it is requested.
    assert np.array_equal(picture(client), expected)
    assert listed(client)["first"]["default"]
    # A model takes as much memory as its headers say.
    said = bytes_in_memory(thin_folder, torch.float32)
    assert said == pytest.approx(bytes_of(model), rel=0.01)


def test_a_model_that_cannot_be_loaded_is_refused_without_its_place(
    client: httpx2.Client, folder: Path
) -> None:
    status, error = refusal(client, "broken")
    assert (status, error["code"]) == (500, "model_mismatch")
    assert (
        error["message"]
        == "model 'broken' has no vae/config.json; a folder in the diffusers layout has one."
    )
    status, error = refusal(client, "huge")
    assert (status, error["code"], error["param"]) == (507, "model_too_large", "model")
    [needed, allowed] = map(int, re.findall(r"\d{6,}", error["message"]))
    assert needed > 2**41 > allowed
    assert str(folder) not in error["message"]
    assert refusal(client, "none")[0] == 404
    assert picture(client).shape == (64, 64, 3)


def test_openais_client_lists_the_models(client: httpx2.Client) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as theirs:
        models = theirs.models.list().data
        assert {model.id for model in models} == listed(client).keys()
        assert theirs.models.retrieve("one").created > 0
        with pytest.raises(openai.NotFoundError):
            theirs.models.retrieve("none")


def test_the_folder_is_looked_into_once_for_all_models(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[None] = []
    look = Settings.found_folders
    monkeypatch.setattr(Settings, "found_folders", lambda self: looked.append(None) or look(self))
    assert len(listed(client)) > 5
    assert len(looked) == 1
    assert picture(client, model="first").any()
    assert len(looked) == 1


def test_the_metrics_look_into_no_folder(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[None] = []
    monkeypatch.setattr(Settings, "found_folders", lambda _: looked.append(None) or [])
    text = client.get("/metrics").text
    assert 'weft_model_memory_bytes{model="first"}' in text
    assert not looked


class Slow:
    """A store from which one more model comes after a while."""

    def __init__(self) -> None:
        self.may_fail = Event()

    def created(self) -> Mapping[str, int]:
        return dict.fromkeys(("slow",), 0)

    def needs(self, name: str) -> int:
        return 0

    def needs_on_host(self, name: str) -> int:
        return 0

    def host_free(self) -> int:
        return 0

    def room(self, loaded_bytes: int) -> MemoryBudget:
        return MemoryBudget(1, 1)

    def load(self, name: str, on_progress: Callable[[int, int], None]) -> HostedModel:
        self.may_fail.wait(PATIENCE_S)
        raise ModelMismatch("It is gone.")


def test_who_leaves_while_the_model_of_a_stream_is_loaded_is_forgotten() -> None:
    source = Slow()
    made = SmallServer(Settings(), Hosted(started(Toy(), 8), {"toy": Toy()}, source))
    made.start()
    state = made.app.state
    asked: dict[str, dict[str, Any]] = {
        "/v1/generate": {"stream": True},
        "/v1/images/generations": {"stream": True},
        "/v1/stream": {},
    }

    def waiting() -> bool:
        return bool(state.service._under_way or state.streams.sessions)

    try:
        for path, fields in asked.items():
            body = json.dumps({"prompt": "x", "model": "slow"} | fields).encode()
            with made.connect() as leaving:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
                head += "\r\nContent-Type: application/json\r\n\r\n"
                leaving.sendall(head.encode() + body)
                made.wait(waiting)
            made.wait(lambda: not waiting())
    finally:
        source.may_fail.set()
        made.stop()


def test_a_folder_that_comes_later_is_known_at_once_and_one_that_is_removed_no_longer(
    client: httpx2.Client, folder: Path, thin_folder: Path
) -> None:
    (folder / "later").symlink_to(thin_folder)
    assert not listed(client)["later"]["loaded"]
    (folder / "later").unlink()
    assert "later" not in listed(client)
    # One that existed at the start.
    (folder / "three").unlink()
    try:
        assert "three" not in listed(client)
        assert refusal(client, "three")[0] == 404
    finally:
        (folder / "three").symlink_to(thin_folder)


def test_clients_of_automatic1111_unload_their_model_and_load_it_again(
    client: httpx2.Client,
) -> None:
    api = "/sdapi/v1"

    def first_is_loaded() -> bool:
        return listed(client)["first"]["loaded"]

    expected = picture(client)
    for _ in range(2):
        assert client.post(f"{api}/unload-checkpoint").json() == {}
        assert not first_is_loaded()
    assert client.post(f"{api}/reload-checkpoint").json() == {}
    assert first_is_loaded()
    assert np.array_equal(picture(client), expected)
    # Both act on the model that the client has chosen, and a request loads it too.
    client.post(f"{api}/options", json={"sd_model_checkpoint": "two"})
    try:
        client.post(f"{api}/reload-checkpoint")
        client.post(f"{api}/unload-checkpoint")
        assert not listed(client)["two"]["loaded"]
        assert first_is_loaded()
        assert np.array_equal(picture(client, model="two"), expected)
    finally:
        client.post(f"{api}/options", json={"sd_model_checkpoint": "first"})


def test_a_server_that_cannot_compile_says_why_and_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thin_folder: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = Settings(compile=True, cache=tmp_path, models=(str(thin_folder),))
    hosted = host(settings, guessed_costs={1: 0.01})
    [model] = hosted.models.values()
    hosted.engine.stop(0)
    state = ModelState("m", True, 0, model, 0, 0, 0.0, None, PreparedForwards())
    reason = "there is no C++ compiler 'no-such-compiler'; install it, or set CXX"
    assert card_of(state).compilation == CompilationCard(
        compiled=0, waiting=0, eager=0, reason=reason
    )

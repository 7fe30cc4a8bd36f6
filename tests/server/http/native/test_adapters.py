"""Adapters over HTTP: listed, named by requests, and never paths."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from server.models.adapters.adapter import Adapter
from server.models.adapters.shelf import AdapterShelf
from tests.server.conftest import Running
from tests.server.stream_client import SMALL, opened

Generate = Callable[..., httpx2.Response]


@pytest.fixture(scope="module")
def pastel(running: Running, adapters_folder: Path) -> str:
    running.put_adapter(adapters_folder / "pastel.safetensors")
    return "pastel"


def file_of(answer: httpx2.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0]["b64_json"])


def test_an_adapter_changes_the_picture_and_the_settings_make_it_again(
    generate: Generate, client: httpx2.Client, pastel: str
) -> None:
    plain = file_of(generate())
    answer = generate(adapters=[{"name": pastel, "weight": 0.8}])
    adapted = file_of(answer)
    with Image.open(io.BytesIO(adapted)) as picture, Image.open(io.BytesIO(plain)) as before:
        assert picture.tobytes() != before.tobytes()
        text: Any = picture.info
    assert 'Lora: "<lora:pastel:0.8>"' in text["parameters"]
    assert json.loads(text["weft"])["adapters"] == [{"name": pastel, "weight": 0.8}]
    again = client.post("/v1/generate", json=answer.json()["settings"])
    assert file_of(again) == adapted
    assert file_of(generate(adapters=[{"name": pastel, "weight": 0}])) != adapted


def test_a_weight_of_0_draws_the_picture_without(generate: Generate, pastel: str) -> None:
    pictures = [
        Image.open(io.BytesIO(file_of(answer))).tobytes()
        for answer in (generate(), generate(adapters=[{"name": pastel, "weight": 0}]))
    ]
    assert pictures[0] == pictures[1]


def test_the_catalog_lists_the_adapters_of_each_model(client: httpx2.Client, pastel: str) -> None:
    models = {one["name"]: one for one in client.get("/v1/catalog").json()["models"]}
    listed = {one["name"]: one for one in models["embedded"]["adapters"]}
    assert listed[pastel] == {
        "name": pastel,
        "rank": 4,
        "changes": ["text_encoder", "unet"],
        "defaults": None,
    }


@pytest.mark.parametrize("name", ["attic", "../pastel", "/etc/passwd", "pastel.safetensors"])
def test_an_unknown_name_is_refused_with_those_that_are_known(
    generate: Generate, pastel: str, name: str
) -> None:
    answer = generate(adapters=[pastel, name])
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "adapters.1.name"
    assert (
        f"{name!r} is not among the adapters of model 'embedded'; these are: " in error["message"]
    )


def test_the_frames_of_a_stream_have_its_adapters(
    running: Running, generate: Generate, pastel: str
) -> None:
    settings: dict[str, Any] = {"adapters": [pastel], "width": 64, "height": 64}
    with opened(running.url) as stream:
        stream.settings(prompt="a red circle", steps=2, seed=5, source="text", **settings)
        frame = stream.output().pixels
    running.settle()
    alone = generate(output_format="jpeg", **settings)
    assert np.array_equal(frame, np.asarray(Image.open(io.BytesIO(file_of(alone)))))


def test_the_adapters_of_a_stream_are_loaded_once_for_all_frames(
    running: Running, pastel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = AdapterShelf.load

    def counted(self: AdapterShelf, name: str) -> Adapter:
        loaded.append(name)
        return load(self, name)

    monkeypatch.setattr(AdapterShelf, "load", counted)
    with opened(running.url) as stream:
        stream.settings(**SMALL, adapters=[pastel], source="text", seed_step=1)
        for _ in range(3):
            stream.output()
    running.settle()
    assert loaded == [pastel]


def test_settings_whose_adapters_find_no_room_are_refused_and_the_stream_goes_on(
    running: Running, adapters_folder: Path, pastel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = adapters_folder / "charcoal.safetensors"
    other.write_bytes((adapters_folder / f"{pastel}.safetensors").read_bytes())
    shelf = running.app.state.service.ready_shelf().loaded()[0].adapters
    with opened(running.url) as stream, opened(running.url) as later:
        stream.settings(**SMALL, adapters=[pastel], source="text")
        stream.output()
        room_for_one = shelf.find(pastel).nbytes(torch.float32)
        monkeypatch.setattr(shelf._memory, "max_bytes", room_for_one)
        error = later.settings(**SMALL, adapters=[other.stem], source="text")["error"]
        assert error["code"] == "overloaded"
        assert error["message"].startswith("The adapters of running requests fill the memory")
        later.settings(**SMALL, source="text")
        assert later.output().header["frame"] == 0
    other.unlink()
    running.settle()

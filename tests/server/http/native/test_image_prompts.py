"""Image prompts over HTTP: listed, named by requests, and errors in their pictures."""

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
from PIL import Image

from tests.server.conftest import Running
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder

Generate = Callable[..., httpx2.Response]


@pytest.fixture(scope="module")
def style(running: Running, image_prompts_folder: Path) -> str:
    [model, *_] = running.app.state.service.ready_shelf().loaded()
    put_encoder(image_prompts_folder)
    put_adapter(model.modules()["unet"], image_prompts_folder, "style", 1)
    return "style"


def prompt(seed: int = 1, **fields: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return {"name": "style", "image": encoded(Image.fromarray(pixels)), **fields}


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def picture_of(answer: httpx2.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["b64_json"])))


def test_a_picture_beside_the_prompt_changes_the_image_and_is_in_its_text(
    generate: Generate, style: str
) -> None:
    pictures = [
        picture_of(answer)
        for answer in (
            generate(),
            generate(image_prompts=[prompt()]),
            generate(image_prompts=[prompt(2)]),
            generate(image_prompts=[prompt(scale=0)]),
        )
    ]
    plain, prompted, otherwise, off = (picture.tobytes() for picture in pictures)
    assert len({plain, prompted, otherwise}) == 3
    assert off == plain
    text = pictures[1].info
    assert "IP-Adapter 0:" in text["parameters"]
    written = {"name": style, "scale": 1.0, "start": 0.0, "end": 1.0}
    assert json.loads(text["weft"])["image_prompts"] == [written]


def test_several_pictures_and_regions_act(generate: Generate, style: str) -> None:
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    here = encoded(left)
    pair = [prompt()["image"], prompt(2)["image"]]
    asked = {
        "one": prompt(),
        "both": prompt(image=pair),
        "here": prompt(mask=here),
        "everywhere": prompt(mask=encoded(Image.new("L", (8, 8), 255))),
    }
    made = {name: picture_of(generate(image_prompts=[one])) for name, one in asked.items()}
    files = {name: picture.tobytes() for name, picture in made.items()}
    assert files["everywhere"] == files["one"]
    assert len({files[name] for name in ("one", "both", "here")}) == 3


def test_both_runs_of_hires_are_prompted(generate: Generate, style: str) -> None:
    hires = {"width": 64, "height": 64, "hires": {"scale": 1.5, "strength": 0.9}}
    below = Image.new("L", (64, 64))
    below.paste(255, (0, 40, 64, 64))
    prompts = [prompt(), prompt(2), prompt(mask=encoded(below))]
    made = {picture_of(generate(**hires, image_prompts=[one])).tobytes() for one in prompts}
    assert len(made) == 3


def test_what_is_wrong_with_an_image_prompt_is_said(
    generate: Generate, client: httpx2.Client, style: str
) -> None:
    broken = generate(image_prompts=[prompt(), {"name": style, "image": "aGVsbG8="}])
    assert (broken.status_code, broken.json()["error"]["param"]) == (422, "image_prompts.1.image")
    pair = generate(image_prompts=[prompt(image=[prompt()["image"], "aGVsbG8="])])
    assert (pair.status_code, pair.json()["error"]["param"]) == (422, "image_prompts.0.image.1")
    black = generate(image_prompts=[prompt(mask=encoded(Image.new("L", (8, 8))))])
    assert black.json()["error"]["message"] == (
        "image_prompts.0.mask is black everywhere, so that it would act nowhere; paint white and "
        "opaque where it should."
    )
    unknown = generate(image_prompts=[prompt(name="../style")])
    assert unknown.status_code == 422
    assert unknown.json()["error"]["message"] == (
        "image_prompts.0.name: '../style' is not among the IP-Adapters of model 'embedded'; these "
        "are: style."
    )
    models = {one["name"]: one for one in client.get("/v1/catalog").json()["models"]}
    assert {"name": style, "tokens": 4} in models["embedded"]["image_prompts"]

"""ControlNets over HTTP: listed, named by requests, and their pictures in JSON and in forms."""

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
from tests.server.models.controls.tiny_controls import put_depth

Generate = Callable[..., httpx2.Response]


@pytest.fixture(scope="module")
def depth(running: Running, controls_folder: Path) -> str:
    return put_depth(running.app.state.service.ready_shelf().loaded()[0], controls_folder)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def control(seed: int = 1, **fields: Any) -> dict[str, Any]:
    return {"name": "depth", "image": base64.b64encode(png(seed)).decode(), **fields}


def file_of(answer: httpx2.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0]["b64_json"])


def test_a_control_steers_the_picture_and_is_in_its_text(generate: Generate, depth: str) -> None:
    files = [
        file_of(generate()),
        file_of(generate(controls=[control()])),
        file_of(generate(controls=[control(2)])),
        file_of(generate(controls=[control(scale=0)])),
    ]
    opened = [Image.open(io.BytesIO(file)) for file in files]
    plain, steered, otherwise, off = (picture.tobytes() for picture in opened)
    assert len({plain, steered, otherwise}) == 3
    assert off == plain
    text = opened[1].info
    assert "ControlNet 0:" in text["parameters"]
    written = {"name": depth, "scale": 1.0, "start": 0.0, "end": 1.0}
    assert json.loads(text["weft"])["controls"] == [written]


def test_a_form_has_the_pictures_of_controls_as_files(client: httpx2.Client, depth: str) -> None:
    """Checked on OpenAI's edits, which take a form, against the same request as JSON."""
    plain = {"prompt": "a red circle", "steps": "2", "seed": "5", "size": "64x64"}
    fields = {
        "controls[0][name]": depth,
        "controls[0][scale]": "0.5",
        "controls[1][name]": depth,
        "controls[1][end]": "0.5",
    }
    files = {f"controls[{i}][image]": (f"{i}.png", png(i), "image/png") for i in range(2)}
    files["image"] = ("image.png", png(3), "image/png")
    form = client.post("/v1/images/edits", data=plain | fields, files=files)
    body: dict[str, Any] = plain | {"steps": 2, "seed": 5, "image": control(3)["image"]}
    steered = body | {"controls": [control(0, scale=0.5), control(1, end=0.5)]}
    sent = [client.post("/v1/images/edits", json=one) for one in (steered, body)]
    made, same, unsteered = (one.json()["data"][0]["b64_json"] for one in (form, *sent))
    assert made == same
    assert made != unsteered


def test_a_second_run_reads_the_picture_of_a_control_at_its_own_size(
    generate: Generate, depth: str
) -> None:
    """At the size of the first run, it would lose detail."""
    steered = {"name": depth, "image": encoded(Image.open(io.BytesIO(png(1))).resize((96, 96)))}
    sizes = {"width": 64, "height": 64}
    both = generate(**sizes, controls=[steered], hires={"scale": 1.5, "strength": 1})
    first = Image.open(io.BytesIO(file_of(generate(**sizes, controls=[steered]))))
    second = generate(
        image=encoded(first.resize((96, 96), Image.Resampling.LANCZOS)),
        strength=1,
        width=96,
        height=96,
        controls=[steered],
    )
    made, expected = (Image.open(io.BytesIO(file_of(answer))) for answer in (both, second))
    assert made.tobytes() == expected.tobytes()


def test_what_is_wrong_with_a_control_is_said(
    generate: Generate, client: httpx2.Client, depth: str
) -> None:
    broken = generate(controls=[control(), {"name": depth, "image": "aGVsbG8="}])
    assert (broken.status_code, broken.json()["error"]["param"]) == (422, "controls.1.image")
    unknown = generate(controls=[control(name="../depth")])
    assert unknown.status_code == 422
    assert unknown.json()["error"]["message"] == (
        "controls.0.name: '../depth' is not among the ControlNets of model 'embedded'; these are: "
        "depth."
    )
    form = client.post(
        "/v1/images/edits",
        data={"prompt": "x", "controls[0][image]": "eA=="},
        files={"controls[0][name]": ("depth.png", b"x", "image/png")},
    )
    assert (
        form.json()["error"]["message"] == "controls.0.name is a file; no file is accepted there."
    )


def test_the_catalog_lists_the_controls_of_each_model(client: httpx2.Client, depth: str) -> None:
    models = {one["name"]: one for one in client.get("/v1/catalog").json()["models"]}
    assert {"name": depth} in models["embedded"]["controls"]

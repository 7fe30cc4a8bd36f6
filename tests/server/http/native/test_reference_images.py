"""Pictures beside a prompt over HTTP: their number, their sizes, and OpenAI's edits."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from server.http.app import create_app
from server.models.loading import load_model
from server.settings import Settings
from tests.server.decoding.files import saved as as_file
from tests.server.models.tiny_flux2 import make
from tests.server.models.tiny_sdxl import saved
from tests.server.toy_model import started

ASKED: dict[str, Any] = {"prompt": "a star", "steps": 2, "seed": 3, "guidance": "none"}


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = saved(make(distilled=True), tmp_path_factory.mktemp("models") / "klein")
    model = load_model(folder, name="klein", device="cpu", dtype="float32")
    engine = started(model, 8)
    app = create_app(Settings())
    app.state.service.open(engine, {"klein": model})
    yield TestClient(app, base_url="http://127.0.0.1")
    app.state.service.close()
    engine.stop(0)


def file(seed: int, width: int = 24, height: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return as_file(Image.fromarray(pixels), "PNG")


def texts(*files: bytes) -> list[str]:
    return [base64.b64encode(one).decode() for one in files]


def drawn(answer: httpx2.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    [image] = found.get("images") or found["data"]
    return Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))


def test_a_prompt_may_be_about_pictures(klein: TestClient) -> None:
    def generate(*files: bytes, **fields: Any) -> httpx2.Response:
        return klein.post("/v1/generate", json=ASKED | {"reference_images": texts(*files)} | fields)

    alone = drawn(generate(width=24, height=16))
    answer = generate(file(1))
    add_references = drawn(answer)
    assert add_references.size == alone.size == (24, 16)
    both = drawn(generate(file(1), file(2, 8, 8)))
    assert len({one.tobytes() for one in (alone, add_references, both)}) == 3
    # If one side is given, the other follows from the picture's proportions.
    assert drawn(generate(file(1), width=48)).size == (48, 32)
    assert "Reference images: 1," in add_references.info["parameters"]
    assert json.loads(add_references.info["weft"])["reference_images"] == 1
    again = klein.post("/v1/generate", json=answer.json()["settings"])
    assert (again.status_code, again.json()["error"]["param"]) == (422, "reference_images")
    [entry] = klein.get("/v1/catalog").json()["models"]
    assert entry["reference_images"] == 4
    assert generate(*[file(1)] * 5).json()["error"]["param"] == "reference_images"
    broken = generate(file(1), b"hello")
    assert (broken.status_code, broken.json()["error"]["param"]) == (422, "reference_images.1")


def test_a_model_that_reads_none_says_so(generate: Callable[..., httpx2.Response]) -> None:
    answer = generate(reference_images=texts(file(1)))
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(
        "reference_images: model 'embedded' does not read reference images;"
    )


def test_an_edit_of_openai_refers_to_its_images(klein: TestClient) -> None:
    def edit(*files: bytes, **fields: Any) -> httpx2.Response:
        images = [("image[]", one) for one in files]
        return klein.post("/v1/images/edits", data=ASKED | fields, files=images)

    one, two = file(1), file(2, 8, 8)
    for files in ((one,), (one, two)):
        asked = ASKED | {"reference_images": texts(*files)}
        expected = drawn(klein.post("/v1/generate", json=asked))
        assert drawn(edit(*files)).tobytes() == expected.tobytes()
    started_from = klein.post(
        "/v1/generate", json=ASKED | {"image": texts(one)[0], "strength": 0.5}
    )
    assert drawn(edit(one, strength=0.5)).tobytes() == drawn(started_from).tobytes()
    refused = edit(one, two, strength=0.5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "image")


def test_a_model_that_starts_from_images_edits_one(client: httpx2.Client) -> None:
    one = texts(file(1))
    for images, fields, why in (
        (one * 2, {}, "2 images; model 'embedded' edits one at a time."),
        (one * 5, {}, "5 images; at most 4 are allowed."),
        (
            one * 2,
            {"reference_images": one},
            "2 images, but reference_images is set too; send all of them as image.",
        ),
    ):
        answer = client.post("/v1/images/edits", json=ASKED | fields | {"image": images})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["message"]) == ("image", f"image has {why}")

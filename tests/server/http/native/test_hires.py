"""A request with `hires` equals two requests, one after the other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from webuiapi import HiResUpscaler, WebUIApi, WebUIApiResult

from tests.server.conftest import MAX_IMAGES, Running

SMALL: dict[str, Any] = {"steps": 2, "seed": 5, "width": 64, "height": 64}

Post = Callable[..., httpx2.Response]


def images_of(answer: httpx2.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    files = (base64.b64decode(one["b64_json"]) for one in answer.json()["images"])
    return [Image.open(io.BytesIO(file)) for file in files]


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def by_hand(generate: Post, size: tuple[int, int], **second: Any) -> list[NDArray[np.uint8]]:
    """Both runs as separate requests, with the client enlarging in between."""
    drawn: list[NDArray[np.uint8]] = []
    for index, first in enumerate(images_of(generate(**SMALL, n=2))):
        buffer = io.BytesIO()
        first.resize(size, Image.Resampling.LANCZOS).save(buffer, "PNG")
        sent = {"image": base64.b64encode(buffer.getvalue()).decode(), "seed": 5 + index}
        wide = {"width": size[0], "height": size[1]}
        drawn += map(pixels, images_of(generate(**SMALL | wide | sent | second)))
    return drawn


def test_both_runs_make_what_two_requests_make(generate: Post) -> None:
    answer = generate(**SMALL, n=2, hires={"scale": 1.5, "strength": 0.5, "steps": 4})
    expected = by_hand(generate, (96, 96), strength=0.5, steps=4)
    for image, wanted in zip(images_of(answer), expected, strict=True):
        # Images of one batch equal those of two up to rounding, by a level of 255 in places.
        assert np.abs(pixels(image).astype(int) - wanted).max() <= 2
    told = answer.json()
    size = {"width": 96, "height": 96}
    own = {"strength": 0.5, "steps": 4, "upscaler": "lanczos"}
    assert told["settings"]["hires"] == size | own
    # Two images with two predictions each, at 2 steps and then at half of 4.
    assert told["evaluations"]["spent"] == 2 * 2 * (2 + 2)
    again = generate(**told["settings"])
    assert again.json()["images"] == told["images"]
    text: str = images_of(answer)[0].info["parameters"]
    assert "Size: 64x64" in text
    assert "Denoising strength: 0.5, Hires resize: 96x96, Hires steps: 4" in text


def test_progress_counts_both_runs_and_a_cancelled_second_run_frees_its_room(
    running: Running, client: httpx2.Client
) -> None:
    body = SMALL | {"prompt": "x", "stream": True, "n": 2, "hires": {"steps": 150, "strength": 1}}
    seen: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/generate", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and "step" in (data := json.loads(line[6:])):
                seen.append(data)
                if data["step"] > SMALL["steps"]:
                    break
    assert {one["steps"] for one in seen} == {152}
    running.settle()
    assert running.app.state.service.engine.waiting() == {}


def test_a_second_run_that_lately_had_no_room_is_refused_before_the_first(
    running: Running, generate: Post
) -> None:
    engine = running.app.state.service.engine
    before = engine.measurements.evaluations
    engine._overflows.note("embedded", 96, 96, None, free=0)
    try:
        answer = generate(**SMALL, hires={"scale": 1.5})
        assert generate(**SMALL).status_code == 200
    finally:
        engine._overflows.forget()
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "hires.width"
    assert (
        "hires.width x height is 96 x 96; an image of 96 x 96" in answer.json()["error"]["message"]
    )
    assert engine.measurements.evaluations - before == 2 * SMALL["steps"]


def test_automatic1111_s_hires_fix(running: Running, generate: Post) -> None:
    host, port = running.address
    api = WebUIApi(host=host, port=port)
    told: dict[str, Any] = {"prompt": "a red circle", "sampler_name": "Euler", "cfg_scale": 4}
    result = api.txt2img(
        **SMALL,
        **told,
        enable_hr=True,
        hr_scale=2,
        hr_upscaler=HiResUpscaler.Latent,
        hr_second_pass_steps=3,
        denoising_strength=0.7,
    )
    assert isinstance(result, WebUIApiResult)
    hires = {"scale": 2, "steps": 3, "strength": 0.7, "upscaler": "latent"}
    own = {"sampler": "euler", "guidance": {"name": "cfg", "scale": 4}, "spacing": "linspace"}
    (expected,) = images_of(generate(**SMALL, **own, hires=hires))
    assert (pixels(result.image) == pixels(expected)).all()
    assert result.info["warnings"] == []
    # The text of an image reproduces it.
    body = {"infotext": result.info["infotexts"][0], "cfg_scale": 4}
    (again,) = httpx2.post(f"{running.url}/sdapi/v1/txt2img", json=body, timeout=60).json()[
        "images"
    ]
    assert (pixels(Image.open(io.BytesIO(base64.b64decode(again)))) == pixels(expected)).all()
    # A size is rounded down to one that the model draws, as with `width` and `height`.
    odd = api.txt2img(**SMALL, enable_hr=True, hr_resize_x=100, hr_resize_y=103)
    assert isinstance(odd, WebUIApiResult)
    assert odd.image.size == (96, 96)
    with pytest.raises(RuntimeError, match="allowed are: None, Lanczos, Latent, "):
        api.txt2img(**SMALL, enable_hr=True, hr_upscaler=HiResUpscaler.ESRGAN_4x)
    api.session.close()


PICTURE = base64.b64encode(b"of no matter").decode()
"""Requests with this are refused before it is decoded."""


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"hires": {}, "image": PICTURE}, "hires", "leave image out"),
        ({"hires": {}, "n": MAX_IMAGES // 2 + 1}, "n", f"at most {MAX_IMAGES // 2} are allowed"),
        ({"hires": {"width": 128, "height": 100}}, "hires.height", "hires.height is 100"),
        ({"hires": {"width": 4096, "height": 4096}}, "hires.width", "pixels are allowed"),
        ({"hires": {"steps": 999}}, "hires.steps", "hires.steps is 999; at most 200"),
        ({"hires": {"strength": 0.1}}, "hires.strength", "hires.strength is 0.1, which leaves"),
        ({"hires": {"scale": True}}, "hires.scale", "must be a number"),
        ({"hires": {"width": 128}}, "hires", "send both"),
        ({"hires": {"scale": 2, "width": 128, "height": 128}}, "hires", "one or the other"),
        (
            {"hires": {}, "n": 2, "guidance": {"name": "cfg", "scale": 4, "negtome": {}}},
            "hires",
            "leave guidance.particles",
        ),
    ],
)
def test_what_a_second_run_cannot_do_is_said(
    generate: Post, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = generate(**SMALL | fields)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]

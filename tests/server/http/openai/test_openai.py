"""OpenAI's own client against a running server; nothing of it is changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai import OpenAI
from openai.types import ImagesResponse
from PIL import Image

from tests.server.conftest import PATIENCE_S, Running
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder

FAST: dict[str, Any] = {"seed": 5, "steps": 2}
SIDE = 128
SIZE = "64x64"
"""Size of images without an upload."""
SMALL: dict[str, Any] = {"width": 64, "height": 64}


def sdk_of(server: Running) -> OpenAI:
    url = f"{server.url}/v1"
    return OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def sdk(running: Running) -> Iterator[OpenAI]:
    with sdk_of(running) as made:
        yield made


def pixels_of(b64: str | None) -> NDArray[np.uint8]:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


WHITE = np.full((SIDE, SIDE, 4), 255, np.uint8)
HOLE = WHITE.copy()
HOLE[32:96, 32:96, 3] = 0
REPAINTED = HOLE[..., 3] == 0


def native(client: httpx2.Client, **fields: Any) -> list[NDArray[np.uint8]]:
    answer = client.post("/v1/generate", json={"prompt": "a red circle"} | FAST | fields).json()
    return [pixels_of(image["b64_json"]) for image in answer["images"]]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_the_sdk_gets_the_images_of_the_native_route(sdk: OpenAI, client: httpx2.Client) -> None:
    guidance = {"name": "cfg", "scale": 3}
    ours = FAST | {"sampler": "unipc", "guidance": guidance}
    answer = sdk.images.generate(prompt="a red circle", n=2, size=SIZE, extra_body=ours)
    assert (answer.size, answer.output_format, answer.background) == (SIZE, "png", "opaque")
    assert answer.usage is not None
    expected = native(client, n=2, sampler="unipc", guidance=guidance, **SMALL)
    assert answer.data is not None
    for image, pixels in zip(answer.data, expected, strict=True):
        assert (pixels_of(image.b64_json) == pixels).all()
    assert answer.model_extra is not None
    assert answer.model_extra["settings"]["sampler"]["name"] == "unipc"
    assert answer.model_extra["warnings"] == []


def test_what_has_no_effect_is_named(sdk: OpenAI) -> None:
    answer = sdk.images.generate(
        prompt="a red circle",
        model="gpt-image-1",
        quality="high",
        style="vivid",
        moderation="auto",
        user="me",
        size=SIZE,
        extra_body=FAST | {"unheard_of": 1},
    )
    assert answer.model_extra is not None
    ignored, drawn_by = answer.model_extra["warnings"]
    assert ignored.endswith(": quality, style, unheard_of.")
    assert "'gpt-image-1' is OpenAI's" in drawn_by
    assert answer.model_extra["model"] == "embedded"


def test_partial_images_come_nearer_to_the_image(trained: Running) -> None:
    steps = {"seed": 5, "steps": 6}
    with sdk_of(trained) as sdk, httpx2.Client(base_url=trained.url, timeout=PATIENCE_S) as client:
        *partial, last = sdk.images.generate(
            prompt="a red circle", size=SIZE, stream=True, partial_images=3, extra_body=steps
        )
        [drawn] = native(client, steps=6, **SMALL)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(partial)
    # A slow reader may miss one.
    assert 1 <= len(partial) <= 3
    assert [getattr(event, "partial_image_index", None) for event in partial] == list(
        range(len(partial))
    )
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == 0
    final = pixels_of(last.b64_json)
    assert (final == drawn).all()
    away = [np.abs(pixels_of(event.b64_json) - final.astype(float)).mean() for event in partial]
    assert away == sorted(away, reverse=True)
    assert {event.size for event in (*partial, last)} == {SIZE}


def test_a_stream_of_several_images_completes_each(sdk: OpenAI, client: httpx2.Client) -> None:
    events = list(
        sdk.images.generate(prompt="a red circle", size=SIZE, stream=True, n=2, extra_body=FAST)
    )
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event, pixels in zip(events, native(client, n=2, **SMALL), strict=True):
        assert (pixels_of(event.b64_json) == pixels).all()


def test_an_edit_repaints_what_is_transparent(sdk: OpenAI, client: httpx2.Client) -> None:
    image = png(WHITE[..., :3])
    answer = sdk.images.edit(
        image=[image],
        mask=png(HOLE),
        prompt="a red circle",
        extra_body=FAST | {"guidance": {"name": "cfg", "policy": {"name": "reuse"}}},
    )
    assert answer.data is not None
    edited = pixels_of(answer.data[0].b64_json)
    assert (edited[:16] == 255).all()
    assert edited[REPAINTED].std() > 10
    mask = png(REPAINTED.astype(np.uint8) * 255)
    guidance = {"name": "cfg", "policy": "reuse"}
    (expected,) = native(client, image=b64(image), mask=b64(mask), guidance=guidance)
    assert (edited == expected).all()


def test_an_image_may_be_its_own_mask_and_an_opaque_one_is_changed_as_a_whole(
    sdk: OpenAI, client: httpx2.Client
) -> None:
    answer = sdk.images.edit(image=png(HOLE), prompt="a red circle", extra_body=FAST)
    assert answer.data is not None
    edited = pixels_of(answer.data[0].b64_json)
    assert (edited[:16] == 255).all()
    assert edited[REPAINTED].std() > 10
    whole = sdk.images.edit(image=png(WHITE), prompt="a red circle", extra_body=FAST)
    assert whole.data is not None
    assert whole.model_extra is not None
    assert whole.model_extra["settings"]["strength"] == 0.75
    (expected,) = native(client, image=b64(png(WHITE)))
    assert (pixels_of(whole.data[0].b64_json) == expected).all()


def test_an_edit_in_json_is_the_edit_of_a_form(sdk: OpenAI) -> None:
    """The SDK has no method for OpenAI's `EditImageBodyJsonParam` yet, so it posts it as it is."""
    image, mask = png(WHITE[..., :3]), png(HOLE)
    in_form = sdk.images.edit(image=image, mask=mask, prompt="a red circle", extra_body=FAST)
    body = FAST | {
        "prompt": "a red circle",
        "images": [{"image_url": f"data:image/png;base64,{b64(image)}"}],
        "mask": {"image_url": f"data:image/png;base64,{b64(mask)}"},
    }
    in_json = sdk.post("/images/edits", cast_to=ImagesResponse, body=body)
    assert in_form.data is not None
    assert in_json.data is not None
    assert in_json.data[0].b64_json == in_form.data[0].b64_json
    assert in_json.model_extra is not None
    assert in_json.model_extra["warnings"] == []


@pytest.mark.usefixtures("slow_denoiser")
def test_an_image_is_decoded_only_if_the_queue_has_room(
    running: Running, client: httpx2.Client
) -> None:
    body = {"prompt": "x", "steps": 200, "n": 8}
    headers = {"x-request-id": "fills-the-queue"}
    filling = Thread(target=lambda: client.post("/v1/generate", json=body, headers=headers))
    filling.start()
    running.wait(lambda: running.app.state.service.engine.measurements.pending == 8)
    try:
        form = {"prompt": (None, "x"), "image": ("a.png", b"no image")}
        assert client.post("/v1/images/edits", files=form).status_code == 429
    finally:
        client.delete("/v1/generate/fills-the-queue")
        filling.join()
        running.settle()


def test_an_edit_may_have_image_prompts(
    sdk: OpenAI, running: Running, client: httpx2.Client, image_prompts_folder: Path
) -> None:
    """The SDK splits them in its form: all names first, then all pictures."""
    [model, *_] = running.app.state.service.ready_shelf().loaded()
    put_encoder(image_prompts_folder)
    put_adapter(model.modules()["unet"], image_prompts_folder, "style", 1)
    noise = np.random.default_rng(1).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    shown = [
        {"name": "style", "image": b64(png(one)), "scale": scale}
        for one, scale in zip(noise, (0.5, 1.5), strict=True)
    ]
    extra = FAST | {"image_prompts": shown}
    answer = sdk.images.edit(image=png(WHITE), prompt="a red circle", extra_body=extra)
    assert answer.data is not None
    (expected,) = native(client, image=b64(png(WHITE)), image_prompts=shown)
    assert (pixels_of(answer.data[0].b64_json) == expected).all()


def test_an_edit_streams_events_of_its_own(sdk: OpenAI) -> None:
    events = sdk.images.edit(
        image=png(WHITE), mask=png(HOLE), prompt="a red circle", stream=True, extra_body=FAST
    )
    assert [event.type for event in events] == ["image_edit.completed"]


def as_edit(images: Any, **more: Any) -> Callable[[OpenAI], Any]:
    """A call that posts references to images as JSON."""
    body = {"prompt": "x", "images": images} | more
    return lambda sdk: sdk.post("/images/edits", cast_to=ImagesResponse, body=body)


DATA_URL = f"data:image/png;base64,{b64(png(WHITE))}"
Refused = tuple[type[openai.APIStatusError], str, str]
BAD = openai.BadRequestError
REFUSED: dict[str, tuple[Callable[[OpenAI], Any], Refused]] = {
    "size": (
        lambda sdk: sdk.images.generate(prompt="x", size="large"),
        (BAD, "size", "'large'"),
    ),
    "steps": (
        lambda sdk: sdk.images.generate(prompt="x", extra_body={"steps": 1000}),
        (BAD, "steps", "at most 200"),
    ),
    "background": (
        lambda sdk: sdk.images.generate(prompt="x", background="transparent"),
        (BAD, "background", "must be one of"),
    ),
    "model": (
        lambda sdk: sdk.images.generate(prompt="x", model="nowhere"),
        (openai.NotFoundError, "model", "embedded"),
    ),
    "images": (
        lambda sdk: sdk.images.edit(prompt="x", image=[png(WHITE)] * 2),
        (BAD, "image", "2 images"),
    ),
    "mask": (
        lambda sdk: sdk.images.edit(prompt="x", image=png(WHITE), mask=png(WHITE)),
        (BAD, "mask", "no transparent pixel"),
    ),
    "remote image": (
        as_edit([{"image_url": DATA_URL}, {"image_url": "https://example.com/source.png"}]),
        (BAD, "images.1.image_url", "'https://example.com/source.png', which is not fetched"),
    ),
    "remote mask": (
        as_edit([{"image_url": DATA_URL}], mask={"image_url": "http://169.254.169.254/"}),
        (BAD, "mask.image_url", "which is not fetched; send a data URL"),
    ),
    "uploaded file": (
        as_edit([{"file_id": "file-abc123"}]),
        (BAD, "images.0.file_id", "no files are stored here; send image_url with a data URL"),
    ),
    "unknown field of a reference": (
        as_edit([{"image_url": DATA_URL, "detail": "high"}]),
        (BAD, "images.0.detail", "only image_url is allowed"),
    ),
    "text in place of a reference": (
        as_edit([DATA_URL]),
        (BAD, "images.0", "must be an object with image_url"),
    ),
    "no images": (as_edit([]), (BAD, "images", "must be a list of 1 to 4 objects")),
    "images of both kinds": (
        as_edit([{"image_url": DATA_URL}], image=DATA_URL),
        (BAD, "images", "and image is too; send one of them"),
    ),
    "several images in json": (
        as_edit([{"image_url": DATA_URL}] * 2),
        (BAD, "image", "2 images"),
    ),
    "markup": (
        lambda sdk: sdk.images.edit(prompt="x", image=png(WHITE), markup=png(HOLE)),
        (BAD, "markup", "no file is accepted there"),
    ),
    "stream": (
        lambda sdk: list(sdk.images.generate(prompt="x", stream=True, n=1000)),
        (BAD, "n", "at most"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_sdk_raises_its_own_errors(sdk: OpenAI, name: str) -> None:
    call, (kind, param, words) = REFUSED[name]
    with pytest.raises(kind) as refusal:
        call(sdk)
    assert refusal.value.param == param
    assert words in refusal.value.message
    assert refusal.value.request_id == refusal.value.response.headers["x-request-id"]


def test_the_sdk_lists_the_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["embedded", "embedded-lcm"]
    assert sdk.models.retrieve("embedded").object == "model"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("some/where")


def test_open_webui_s_calls_are_answered(client: httpx2.Client) -> None:
    """What its OpenAI image engine sends, and what it reads from the answer."""
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json"}
    body = {"model": "embedded-lcm", "prompt": "a red circle", "n": 1, "size": SIZE}
    body |= {"response_format": "b64_json"}
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    answer.raise_for_status()
    for image in answer.json()["data"]:
        assert image.get("url") is None
        assert pixels_of(image["b64_json"]).shape == (64, 64, 3)
    refused = client.post("/v1/images/generations", json=body | {"model": "?"}, headers=headers)
    assert "is not hosted here" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("model", "asked", "links"),
    [
        ("dall-e-3", {}, True),
        ("dall-e-3", {"response_format": "b64_json"}, False),
        ("gpt-image-1", {}, False),
        ("embedded", {}, False),
    ],
)
def test_clients_of_dall_e_get_links_where_they_ask_for_nothing_else(
    sdk: OpenAI, client: httpx2.Client, model: str, asked: dict[str, Any], links: bool
) -> None:
    """LangChain's DallEAPIWrapper and LibreChat's DALLE3 tool leave the format out and read `url`.

    Both call the SDK like this (langchain-community 0.4.2).
    """
    answer = sdk.images.generate(
        prompt="a red circle", n=1, size=SIZE, model=model, quality="standard", **asked
    )
    assert answer.data is not None
    (image,) = answer.data
    assert (image.url is not None, image.b64_json is None) == (links, links)
    if image.url is not None:
        assert Image.open(io.BytesIO(client.get(image.url).content)).size == (64, 64)


def test_a_stream_for_a_client_of_dall_e_contains_its_images(sdk: OpenAI) -> None:
    events = sdk.images.generate(
        prompt="a red circle", size=SIZE, model="dall-e-3", stream=True, extra_body=FAST
    )
    assert [event.type for event in events] == ["image_generation.completed"]


def test_what_a_client_sends_empty_it_leaves_out(client: httpx2.Client) -> None:
    """go-openai (1.41.2, image.go) sends all fields in the form of an edit, set or not."""
    form = {"prompt": "a red circle", "n": "1", "size": "", "response_format": ""}
    answer = client.post(
        "/v1/images/edits", data=form | {"steps": "2"}, files={"image": ("a.png", png(WHITE))}
    )
    answer.raise_for_status()
    assert pixels_of(answer.json()["data"][0]["b64_json"]).shape == (SIDE, SIDE, 3)
    assert answer.json()["warnings"] == []

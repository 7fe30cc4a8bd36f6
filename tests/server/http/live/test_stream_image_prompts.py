"""Image prompts of live streams: sent with the settings, encoded once, and changed at any time."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from server.http.live.stream import MAX_SETTINGS_CHARACTERS
from tests.server.conftest import Running
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder
from tests.server.stream_client import SMALL, StreamClient, file_of, opened, pixels_of


@pytest.fixture
def speaker(running: Running, image_prompts_folder: Path) -> Iterator[StreamClient]:
    """A stream of a server whose model has the IP-Adapter `style`."""
    [model, *_] = running.app.state.service.ready_shelf().loaded()
    put_encoder(image_prompts_folder)
    put_adapter(model.modules()["unet"], image_prompts_folder, "style", 1)
    with opened(running.url) as client:
        yield client
    running.settle()


def prompt(seed: int, side: int = 24, **fields: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"name": "style", "image": base64.b64encode(file.getvalue()).decode(), **fields}


def mask() -> str:
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    file = io.BytesIO()
    left.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def alone(client: httpx2.Client, frame: bytes, **fields: Any) -> NDArray[np.uint8]:
    """What a separate request makes of a frame."""
    shared = {name: SMALL[name] for name in ("prompt", "steps", "seed", "width", "height")}
    body = shared | {"image": base64.b64encode(frame).decode()} | fields
    answer = client.post("/v1/generate", json=body, headers={"accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return pixels_of(answer.content)


def test_frames_are_the_images_of_requests_with_the_same_pictures(
    running: Running,
    speaker: StreamClient,
    client: httpx2.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [model, *_] = running.app.state.service.ready_shelf().loaded()
    encode, encoded = model.image_attention.tokens, list[int]()

    def counting(adapter: Any, pictures: Tensor) -> Tensor:
        encoded.append(len(pictures))
        return encode(adapter, pictures)

    monkeypatch.setattr(model.image_attention, "tokens", counting)
    frame, first, second = file_of(90), prompt(11, scale=0.8), prompt(12, mask=mask())
    said = speaker.settings(**SMALL, image_prompts=[first])
    assert said["settings"]["image_prompts"] == [
        {"name": "style", "scale": 0.8, "start": 0.0, "end": 1.0}
    ]
    shown = [speaker.turned(frame).pixels for _ in range(2)]
    # They stay when other settings change, and the region follows the size.
    speaker.settings(prompt="a large blue square")
    blue = speaker.turned(frame).pixels
    speaker.settings(image_prompts=[second])
    changed = speaker.turned(frame).pixels
    speaker.settings(width=96)
    wide = speaker.turned(frame).pixels
    speaker.settings(image_prompts=None)
    without = speaker.turned(frame).pixels
    assert len(encoded) == 2, "each picture is encoded once"

    other: dict[str, Any] = {"prompt": "a large blue square"}
    expected = alone(client, frame, image_prompts=[first])
    assert all(np.array_equal(one, expected) for one in shown)
    assert np.array_equal(blue, alone(client, frame, **other, image_prompts=[first]))
    assert np.array_equal(changed, alone(client, frame, **other, image_prompts=[second]))
    other["width"] = 96
    assert np.array_equal(wide, alone(client, frame, **other, image_prompts=[second]))
    assert np.array_equal(without, alone(client, frame, **other))
    assert len({one.tobytes() for one in (blue, changed)}) == 2


def test_another_picture_smears_over_no_frame(speaker: StreamClient, client: httpx2.Client) -> None:
    frame, steps = file_of(70), {"steps": 6}
    speaker.settings(**SMALL | steps, image_prompts=[prompt(13)])
    speaker.tell(frame)
    time.sleep(0.05)
    speaker.tell(json.dumps({"image_prompts": [prompt(14)]}))
    speaker.tell(frame)
    said = [speaker.heard()]
    images: list[tuple[int, NDArray[np.uint8]]] = []
    while len(images) < 2:
        if "frame" in said[-1]:
            data = speaker.socket.recv()
            assert isinstance(data, bytes)
            images.append((said[-1]["frame"], pixels_of(data)))
        if len(images) < 2:
            said.append(speaker.heard())
    [changed] = [one["from_frame"] for one in said if "settings" in one]
    expected = [alone(client, frame, **steps, image_prompts=[prompt(k)]) for k in (13, 14)]
    for number, image in images:
        assert np.array_equal(image, expected[number >= changed])
    assert images[-1][0] >= changed


def test_a_message_may_be_long_by_its_pictures_alone(
    running: Running, speaker: StreamClient
) -> None:
    large = prompt(15, side=320)
    assert len(large["image"]) > MAX_SETTINGS_CHARACTERS
    assert "settings" in speaker.settings(**SMALL, image_prompts=[large])
    speaker.tell(json.dumps({"prompt": [0] * MAX_SETTINGS_CHARACTERS}))
    assert "only pictures in base64 may make it longer" in speaker.heard()["error"]["message"]
    most = running.app.state.settings.streams.frame_bytes
    speaker.tell(json.dumps({"image_prompts": [prompt(16) | {"image": "A" * most}]}))
    assert f"at most {most} are allowed" in speaker.heard()["error"]["message"]
    speaker.tell(json.dumps({"image_prompts": [prompt(16) | {"image": "aGVsbG8="}]}))
    assert speaker.heard()["error"]["param"] == "image_prompts.0.image"
    # The old settings remain.
    assert speaker.settings(steps=1)["settings"]["image_prompts"][0]["name"] == "style"


def test_streams_of_events_take_them_too(speaker: StreamClient, client: httpx2.Client) -> None:
    made: list[bytes] = []
    plain = {name: SMALL[name] for name in ("prompt", "steps", "seed", "width", "height")}
    for beside in ({}, {"image_prompts": [prompt(17)]}):
        body = plain | {"output_format": "png"} | beside
        with client.stream("POST", "/v1/stream", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            told = (json.loads(one[6:]) for one in answer.iter_lines() if one.startswith("data: "))
            made.append(next(one["image"] for one in told if "image" in one))
    assert len(set(made)) == 2

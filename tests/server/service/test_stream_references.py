"""Live streams whose frames are edits: of each input frame, and of pictures beside all of them."""

from __future__ import annotations

import asyncio
import base64
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from server.errors import InvalidRequest, NotReady
from server.models.conditioning import Conditioning
from server.models.references import ReferencesRead
from server.requests.schema import GenerateRequest
from server.requests.stream_schema import StreamSettings
from server.service.service import Service
from server.service.stream import FailedFrame, StreamSession
from server.service.stream_input import check_source
from server.service.streams import Streams
from server.settings import Limits, Settings
from tests.server.stream_client import file_of, pixels_of
from tests.server.toy_model import Toy, started

SETTINGS: dict[str, Any] = {
    "prompt": "x",
    "steps": 3,
    "seed": 5,
    "guidance": {"name": "cfg", "scale": 2.0},
    "output_format": "png",
    "max_fps": 1000,
    "width": 32,
    "height": 32,
}


class Referring(Toy):
    """A toy that draws by the pictures its two networks are shown, in their order."""

    def __init__(self) -> None:
        super().__init__(references=ReferencesRead(3, (), 64 * 64, 32 * 32))
        self.encoded: list[float] = []
        self.read: list[ref[Tensor]] = []

    @override
    def encode_image(self, pixels: Tensor) -> Tensor:
        self.encoded += pixels.flatten(1).mean(1).tolist()
        return super().encode_image(pixels)

    @override
    def encode_prompts(
        self, prompts: Any, width: int, height: int, adapters: Any = None, options: Any = None
    ) -> list[Conditioning]:
        saw = sum(place * one.pixels.mean() for place, one in enumerate(options.pictures, start=1))
        return [
            replace(told, tensors={"shift": told.tensors["shift"] + saw / 300})
            for told in super().encode_prompts(prompts, width, height, adapters, options)
        ]

    @override
    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        self.read += map(ref, references)
        read = [place * one.mean() for place, one in enumerate(references, start=1)]
        return replace(text, tensors={"shift": text.tensors["shift"] + torch.stack(read).sum()})


@pytest.fixture(scope="module")
def model() -> Referring:
    return Referring()


@pytest.fixture(scope="module")
def service(model: Referring) -> Iterator[Service]:
    engine, made = started(model, 8), Service(Limits())
    made.open(engine, {"toy": model})
    yield made
    made.close()
    engine.stop(0)


async def turned(session: StreamSession, frame: bytes) -> NDArray[np.uint8]:
    """What a stream makes of a frame, while no other is in progress."""
    assert session.offer(frame) is None
    output = await session.next()
    assert not isinstance(output, FailedFrame), output.error
    return pixels_of(output.data)


async def alone(service: Service, **fields: Any) -> NDArray[np.uint8]:
    """The image of a separate request."""
    shared = {name: one for name, one in SETTINGS.items() if name != "max_fps"}
    generation = await service.admit(GenerateRequest.model_validate(shared | fields), "one")
    try:
        [picture] = (await service.pictures(generation)).pictures
        return pixels_of(picture.data)
    finally:
        service.release(generation)


def test_frames_are_the_edits_of_requests_with_the_same_pictures(service: Service) -> None:
    first, second, _ = frames = [file_of(shade, (48, 32)) for shade in (40, 200, 120)]
    *texts, hat = (base64.b64encode(one).decode() for one in frames)

    async def check() -> None:
        session = (streams := Streams(service, Settings())).open()
        try:
            said = await session.change(SETTINGS | {"source": "references"})
            assert "reference_images" not in said["settings"]
            bare = [await turned(session, one) for one in (first, second)]
            said = await session.change({"reference_images": [hat]})
            assert said["settings"]["reference_images"] == 1
            beside = await turned(session, second)
            await session.change({"source": "frames", "strength": 1.0})
            begun = await turned(session, second)
        finally:
            streams.close(session)
        for shown, text in zip(bare, texts, strict=True):
            assert np.array_equal(shown, await alone(service, reference_images=[text]))
        assert np.array_equal(beside, await alone(service, reference_images=[texts[1], hat]))
        own = {"image": texts[1], "strength": 1.0, "reference_images": [hat]}
        assert np.array_equal(begun, await alone(service, **own))
        assert len({one.tobytes() for one in (*bare, beside, begun)}) == 4

    asyncio.run(check())


def test_pictures_of_the_settings_are_encoded_once_while_they_stay(
    service: Service, model: Referring
) -> None:
    frame, hat, coat = (file_of(shade, (48, 32)) for shade in (40, 120, 200))
    texts = [base64.b64encode(one).decode() for one in (frame, hat, coat)]

    async def check() -> None:
        session = (streams := Streams(service, Settings())).open()
        model.encoded.clear()
        try:
            await session.change(SETTINGS | {"source": "references", "reference_images": texts[1:]})
            made = [await turned(session, frame) for _ in range(3)]
            await session.change({"prompt": "y"})
            await turned(session, frame)
            assert sorted(Counter(model.encoded).values()) == [1, 1, 4]
            model.encoded.clear()
            await session.change({"prompt": "x", "reference_images": [texts[2]]})
            made += [await turned(session, frame) for _ in range(2)]
            assert sorted(Counter(model.encoded).values()) == [1, 2], "what was sent anew"
        finally:
            streams.close(session)
            del session
        both = await alone(service, reference_images=texts)
        one = await alone(service, reference_images=[texts[0], texts[2]])
        until = monotonic() + 10
        while any(latents() is not None for latents in model.read):
            assert monotonic() < until, "latents of pictures that are gone are kept"
            await asyncio.sleep(0.01)
        assert [np.array_equal(shown, both) for shown in made] == [True] * 3 + [False] * 2
        assert [np.array_equal(shown, one) for shown in made] == [False] * 3 + [True] * 2

    asyncio.run(check())


async def refused(session: StreamSession) -> None:
    assert session.offer(b"no picture") is None
    assert isinstance(await session.next(), FailedFrame)


async def stopped(session: StreamSession) -> None:
    session.end(NotReady("The server is about to stop."))
    with pytest.raises(NotReady):
        await session.next()


async def idle(session: StreamSession) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("last", [idle, refused, stopped])
def test_pictures_of_a_closed_stream_go_without_a_collection_of_cycles(
    service: Service, last: Callable[[StreamSession], Awaitable[None]]
) -> None:
    frame, hat = (file_of(shade, (48, 32)) for shade in (40, 120))

    async def seen_and_closed() -> tuple[ref[StreamSession], ref[Tensor]]:
        session = (streams := Streams(service, Settings())).open()
        try:
            beside = {"reference_images": [base64.b64encode(hat).decode()]}
            await session.change(SETTINGS | {"source": "references"} | beside)
            await turned(session, frame)
            await last(session)
            assert session._current is not None
            return ref(session), ref(session._current.beside.references[0])
        finally:
            streams.close(session)

    async def check() -> None:
        kept, until = await seen_and_closed(), monotonic() + 10
        while any(one() is not None for one in kept):
            assert monotonic() < until, "what a closed stream had is kept"
            await asyncio.sleep(0.01)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(check())
    finally:
        gc.enable()


def test_more_pictures_than_the_model_reads_with_the_frame_are_refused(service: Service) -> None:
    three = [base64.b64encode(file_of(shade, (16, 16))).decode() for shade in (1, 2, 3)]

    async def change() -> None:
        session = (streams := Streams(service, Settings())).open()
        try:
            await session.change(SETTINGS | {"source": "text", "reference_images": three})
            await session.change({"source": "references"})
        finally:
            streams.close(session)

    with pytest.raises(InvalidRequest, match="3 images besides each frame"):
        asyncio.run(change())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"source": "references", "guidance": {"name": "cfg", "policy": "residual"}},
            "guidance.policy is 'residual', which with these parameters needs frames to start "
            "from, and source is 'references'; set source to 'frames', or \"mode\": \"onetime\".",
        ),
        (
            {"reference_images": ["AAAA"]},
            "reference_images has 1, but model 'toy' does not read reference images; leave it "
            "out, or send a picture as an input frame with source 'frames'.",
        ),
    ],
    ids=("residual", "references"),
)
def test_refusals_name_what_the_client_of_a_stream_can_change(
    settings: dict[str, Any], sentence: str
) -> None:
    checked = StreamSettings.model_validate({"prompt": "x"} | settings)
    with pytest.raises(InvalidRequest) as caught:
        check_source(checked, Toy().facts)
    assert caught.value.message == sentence
    assert caught.value.field in ("guidance.policy", "reference_images")

"""Reference images reach both networks of a model, each at its own size, in both runs."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from server.engine.client import ANONYMOUS
from server.errors import DidNotFit, InvalidRequest, OutOfMemory
from server.models.conditioning import Conditioning
from server.models.inputs import RowInputs
from server.models.references import ReferencesRead, SeenPicture
from server.models.text_options import TextOptions
from server.requests.schema import GenerateRequest
from server.service.service import Service
from server.settings import Limits
from tests.server.decoding.files import saved
from tests.server.models.alike import task_of
from tests.server.toy_model import Toy, run, started


class Reading(Toy):
    """A toy that records the pictures it is shown, and draws as if without them."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(references=ReferencesRead(3, (), 64 * 64, 32 * 32), **facts)
        self.read: list[list[tuple[int, ...]]] = []
        self.saw: set[tuple[tuple[int, ...], ...]] = set()

    @override
    def encode_prompts(
        self, prompts: Any, width: int, height: int, adapters: Any = None, options: Any = None
    ) -> list[Conditioning]:
        told: TextOptions = options
        self.saw.add(tuple(one.pixels.shape for one in told.pictures))
        return super().encode_prompts(prompts, width, height, adapters, told)

    @override
    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        self.read.append([tuple(one.shape) for one in references])
        return text


class Full(Toy):
    """A toy without memory for large pictures beside an image."""

    def __init__(self) -> None:
        super().__init__(references=ReferencesRead(3))

    @override
    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        cells = sum(one.shape[1] * one.shape[2] for one in references)
        return replace(text, tensors={**text.tensors, "cells": torch.tensor(cells)}, company=cells)

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if any(inputs.conditioning.tensors.get("cells", torch.zeros(1)) > 100):
            raise torch.OutOfMemoryError
        return super().evaluate(x, t, inputs)


class Seeing(Toy):
    """A toy whose texts grow with each picture that the encoder sees."""

    def __init__(self) -> None:
        super().__init__(references=ReferencesRead(3))

    @override
    def encode_prompts(
        self, prompts: Any, width: int, height: int, adapters: Any = None, options: Any = None
    ) -> list[Conditioning]:
        states = torch.zeros(1000 * len(options.pictures), dtype=torch.uint8)
        told = super().encode_prompts(prompts, width, height, adapters, options)
        return [replace(one, tensors={**one.tensors, "states": states}) for one in told]

    @override
    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        return replace(text, tensors={**text.tensors, "read": references[0]})


@contextmanager
def serving(model: Toy, **limits: int) -> Generator[Service]:
    engine, service = started(model, 8), Service(Limits(**limits))
    service.open(engine, {"toy": model})
    try:
        yield service
    finally:
        service.close()
        engine.stop(0)


def asked_with(*sizes: tuple[int, int], **fields: Any) -> GenerateRequest:
    """A request with reference images of these heights and widths."""
    files = [
        base64.b64encode(saved(Image.fromarray(np.zeros((*size, 3), np.uint8)), "PNG")).decode()
        for size in sizes
    ]
    asked = {"prompt": "x", "steps": 2, "guidance": "none", "reference_images": files}
    return GenerateRequest.model_validate(asked | fields)


async def drawn(service: Service, request: GenerateRequest) -> tuple[int, int]:
    """Width and height of the image that a request gives."""
    generation = await service.admit(request, "one")
    try:
        settings = (await service.pictures(generation)).settings
        return settings["width"], settings["height"]
    finally:
        service.release(generation)


def test_both_networks_are_shown_the_pictures_in_both_runs() -> None:
    model = Reading()
    request = asked_with((20, 80), (50, 50), hires={"scale": 2})
    with serving(model) as service:
        model.read.clear()
        model.saw.clear()
        size = asyncio.run(drawn(service, request))
    # As many pixels as the model reads, in multiples of 32, and in cells of 8.
    assert size == (128, 32)
    assert model.read == [[(4, 4, 16), (4, 8, 8)]] * 2
    assert model.saw == {((32, 64, 3), (32, 32, 3))}


def test_a_long_picture_is_brought_to_sides_that_the_model_reads_within_a_low_limit() -> None:
    model = Reading()
    with serving(model, pixels=64 * 64) as service:
        model.read.clear()
        size = asyncio.run(drawn(service, asked_with((8, 512), width=32, height=32)))
        tall = asyncio.run(drawn(service, asked_with((512, 8))))
    assert (size, tall) == ((32, 32), (32, 128))
    assert model.read == [[(4, 4, 16)], [(4, 16, 4)]]


def test_a_size_that_follows_from_a_picture_is_not_refused_beforehand() -> None:
    # The model's own size is too large here, but that of the picture is not.
    model = Reading(default_width=256)
    with serving(model, pixels=64 * 64) as service:
        asyncio.run(service.check(asked_with((16, 16))))
        with pytest.raises(InvalidRequest, match="at most 3"):
            asyncio.run(service.check(asked_with(*[(16, 16)] * 4)))


def test_only_pictures_as_large_as_those_that_did_not_fit_are_refused() -> None:
    size = {"width": 32, "height": 32}
    large, again, small = (asked_with((side, side), **size) for side in (200, 200, 16))
    with serving(Full()) as service:
        with pytest.raises(OutOfMemory):
            asyncio.run(drawn(service, large))
        with pytest.raises(DidNotFit) as refused:
            asyncio.run(drawn(service, again))
        assert asyncio.run(drawn(service, small)) == (32, 32)
    assert refused.value.field == "reference_images"
    assert "ask for fewer or smaller pictures" in refused.value.message


def test_texts_beside_pictures_count_as_large_as_the_last_ones_were() -> None:
    model = Seeing()
    seen = SeenPicture.of(np.zeros((8, 8, 3), np.uint8))
    task = task_of(model, prompt="x", steps=1, guidance={"name": "cfg", "scale": 2.0})
    text = replace(task.text, pictures=(seen,))
    task = replace(task, references=(torch.zeros(3, 32, 32),), text=text)
    engine = started(model, 8)

    def claimed() -> int:
        with engine.reserve(1) as room:
            room.claim([task])
            return engine.waiting()[ANONYMOUS].nbytes

    try:
        before = claimed()
        assert not run(engine, [task]).errors
        # A scalar and the states; the latents of the picture count with those of the image.
        assert claimed() - before == 2 * (4 + 1000)
    finally:
        engine.stop(0)

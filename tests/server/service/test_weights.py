"""Requests with weights in memory do not wait for those whose weights are being read."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image
from typing_extensions import override

from server.errors import Cancelled, NotReady
from server.models.controls.control import Control
from server.models.controls.control_kind import ControlKind
from server.models.controls.shelf import ControlShelf
from server.models.weight_memory import WeightMemory
from server.requests.schema import GenerateRequest
from server.service.service import Service
from server.settings import Limits
from tests.server.decoding.files import saved
from tests.server.models.controls.tiny_controls import Plain, put_plain
from tests.server.toy_model import Toy, started

PATIENCE_S = 20
THREADS = 2
"""Threads of the event loop's executor, instead of one per core and a few more."""


class Slow(Plain):
    """ControlNets whose reading lasts until an event is set."""

    def __init__(self) -> None:
        self.begun, self.readable = Event(), Event()

    @override
    def prepared(self, network: Any) -> Any:
        self.begun.set()
        assert self.readable.wait(PATIENCE_S)
        return network


class Steered(Toy):
    """A toy that takes ControlNets, and draws as if without them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.kind = Slow()
        memory = WeightMemory[Control](2**20, "ControlNets")
        cpu = torch.device("cpu")
        self.controls = ControlShelf([folder], "toy", self.kind, memory, cpu, torch.float32)

    @property
    @override
    def control_kind(self) -> ControlKind:
        return self.kind


def test_one_that_is_read_slowly_holds_up_those_alone_that_want_it(tmp_path: Path) -> None:
    put_plain(tmp_path, "depth")
    model = Steered(tmp_path)
    engine = started(model, 8, max_pending=16)
    service = Service(Limits())
    service.open(engine, {"toy": model})
    picture = base64.b64encode(saved(Image.new("RGB", (32, 32)), "PNG")).decode()
    steered = {"controls": [{"name": "depth", "image": picture}]}

    async def make(identifier: str, **fields: Any) -> int:
        request = GenerateRequest.model_validate({"prompt": "x", "steps": 2} | fields)
        generation = await service.admit(request, identifier)
        try:
            return len((await service.pictures(generation)).pictures)
        finally:
            service.release(generation)

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        waiting = [asyncio.ensure_future(make(f"{i}", **steered)) for i in range(THREADS + 1)]
        assert await asyncio.to_thread(model.kind.begun.wait, PATIENCE_S)
        assert await asyncio.wait_for(make("plain"), PATIENCE_S / 2) == 1
        assert not any(one.done() for one in waiting)
        model.kind.readable.set()
        assert await asyncio.gather(*waiting) == [1] * len(waiting)

    try:
        asyncio.run(run())
    finally:
        service.close()
        engine.stop(0)


@pytest.mark.parametrize("end", ["stop", "cancel"])
def test_a_request_that_waits_for_weights_hears_at_once_that_it_is_over(
    tmp_path: Path, end: str
) -> None:
    put_plain(tmp_path, "depth")
    model = Steered(tmp_path)
    engine = started(model, 8)
    service = Service(Limits())
    service.open(engine, {"toy": model})
    picture = base64.b64encode(saved(Image.new("RGB", (32, 32)), "PNG")).decode()
    fields = {"prompt": "x", "controls": [{"name": "depth", "image": picture}]}

    async def run() -> None:
        request = GenerateRequest.model_validate(fields)
        admitting = asyncio.create_task(service.admit(request, "one"))
        assert await asyncio.to_thread(model.kind.begun.wait, PATIENCE_S)
        if end == "stop":
            service.abandon()
        else:
            service.cancel("one")
        with pytest.raises(NotReady if end == "stop" else Cancelled):
            await asyncio.wait_for(admitting, PATIENCE_S / 2)
        assert not model.kind.readable.is_set()
        model.kind.readable.set()

    try:
        asyncio.run(run())
        assert service.outcomes == {"unavailable" if end == "stop" else "cancelled": 1}
        assert engine.measurements.pending == 0
    finally:
        model.kind.readable.set()
        service.close()
        engine.stop(0)

"""A session of a live stream without its socket: changes while a frame is being taken in."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from server.models.adapters.adapter import Adapter
from server.models.adapters.shelf import AdapterShelf
from server.service.stream import FailedFrame, StreamSession
from server.service.streams import Streams
from server.settings import Settings
from tests.server.conftest import Running
from tests.server.stream_client import SMALL


def test_no_frame_is_made_from_the_prompt_after_a_change_to_input_frames(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = StreamSession._begin

    def submit_and_start(self: StreamSession, frame: Any, *rest: Any) -> None:
        """Delay the change until the engine has started the frame, so that another may come."""
        submit(self, frame, *rest)
        while not (frame.started and changing.is_set()):
            time.sleep(0.005)
        time.sleep(0.05)

    async def change_while_a_frame_is_taken_in() -> None:
        streams = Streams(running.app.state.service, Settings())
        session = streams.open()
        try:
            await session.change(SMALL | {"source": "text", "seed_step": 1, "steps": 8})
            changing.set()
            said = await session.change({"source": "frames", "strength": 1.0})
            await asyncio.sleep(0.2)
            assert session.next_number == said["from_frame"] == 1
        finally:
            streams.close(session)

    changing = asyncio.Event()
    monkeypatch.setattr(StreamSession, "_begin", submit_and_start)
    asyncio.run(change_while_a_frame_is_taken_in())
    running.settle()


def test_adapters_of_a_stream_are_loaded_where_no_other_request_waits_for_them(
    running: Running, adapters_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.put_adapter(adapters_folder / "of-a-stream.safetensors")
    threads: list[str] = []
    load = AdapterShelf.load

    def noted(shelf: AdapterShelf, name: str) -> Adapter:
        threads.append(threading.current_thread().name)
        return load(shelf, name)

    async def change() -> None:
        streams = Streams(running.app.state.service, Settings())
        session = streams.open()
        try:
            await session.change(SMALL | {"source": "text", "adapters": ["of-a-stream"]})
        finally:
            streams.close(session)

    monkeypatch.setattr(AdapterShelf, "load", noted)
    asyncio.run(change())
    assert [name.partition("_")[0] for name in threads] == ["weft-weights"]
    running.settle()


def test_frames_that_are_refused_come_no_faster_than_others(running: Running) -> None:
    engine = running.app.state.service.engine

    async def seconds_of_six() -> float:
        streams = Streams(running.app.state.service, Settings())
        session = streams.open()
        failed, began = 0, time.monotonic()
        try:
            sizes = {"width": 64, "height": 64, "max_fps": 10}
            await session.change(SMALL | sizes | {"source": "text", "seed_step": 1})
            engine._overflows.note("embedded", 64, 64, None, free=0)
            while failed < 6:
                failed += isinstance(await session.next(), FailedFrame)
        finally:
            engine._overflows.forget()
            streams.close(session)
        return time.monotonic() - began

    # The second may come at once.
    assert asyncio.run(seconds_of_six()) > 0.35
    running.settle()

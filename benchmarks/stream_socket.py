"""One client of a live stream, over a WebSocket of a real server."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import connect

from benchmarks.real_server import AUTHORIZATION
from benchmarks.stream_runs import CAMERA_FPS, SETTLING_S, RunResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from websockets.asyncio.client import ClientConnection

    from benchmarks.real_server import Served


def run_socket(
    server: Served, settings: Mapping[str, Any], files: Sequence[bytes], seconds: float
) -> RunResult:
    """Send frames at a camera's frame rate, and time the output.

    Args:
        server: a running server.
        settings: settings of the stream.
        files: frames, which are sent repeatedly.
        seconds: measured time.
    """
    return asyncio.run(_run(f"ws://127.0.0.1:{server.port}/v1/stream", settings, files, seconds))


async def _run(
    address: str, settings: Mapping[str, Any], files: Sequence[bytes], seconds: float
) -> RunResult:
    sent: list[float] = []
    latencies: list[float] = []
    async with connect(address, max_size=None, additional_headers=AUTHORIZATION) as socket:
        await socket.send(json.dumps(settings))
        film = asyncio.create_task(_film(socket, files, sent))
        began = perf_counter()
        while perf_counter() - began < SETTLING_S:
            await _frame(socket)
        began = perf_counter()
        while perf_counter() - began < seconds:
            source = await _frame(socket)
            latencies.append(perf_counter() - sent[source])
        elapsed = perf_counter() - began
        film.cancel()
    return RunResult(seconds=elapsed, latencies=[latencies])


async def _film(socket: ClientConnection, files: Sequence[bytes], sent: list[float]) -> None:
    for number in count():
        sent.append(perf_counter())
        await socket.send(files[number % len(files)])
        await asyncio.sleep(1 / CAMERA_FPS)


async def _frame(socket: ClientConnection) -> int:
    """Read the next frame, and return the index of the input that it was made from."""
    while True:
        message = await socket.recv()
        header = json.loads(message)
        if "error" in header:
            raise RuntimeError(header["error"]["message"])
        if "frame" in header:
            await socket.recv()
            return int(header["source"])

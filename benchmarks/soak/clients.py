"""Clients of all kinds: well-behaved ones, and ones that stall, vanish or send nonsense."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from benchmarks.promises import attackers
from benchmarks.real_server import AUTHORIZATION

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from random import Random

    from benchmarks.real_server import Served

__all__ = ["KINDS", "BrokenServer"]

SAMPLERS: Final = ("dpm_solver_pp", "euler", "heun", "lcm", "unipc", "ddim")
RULES: Final = ("none", "cfg", "apg", "cfg_pp")
SIZES: Final = (64, 128, 192)
FLOOD: Final = 40
PICTURE_BYTES: Final = 3 * 128 * 128
BOMBS: Final = [bomb() for bomb in attackers.BOMBS.values()]


class BrokenServer(Exception):
    """The server gave a response that it never should."""


def _fields(random: Random) -> dict[str, Any]:
    return {
        "prompt": random.choice(("a red circle", "a blue square", "a green triangle at sunset")),
        "steps": random.randint(1, 6),
        "seed": random.randrange(1000),
        "sampler": random.choice(SAMPLERS),
        "guidance": random.choice(RULES),
    }


def _picture(random: Random) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (128, 128), random.randbytes(PICTURE_BYTES)).save(file, "JPEG")
    return file.getvalue()


# Requests.


@asynccontextmanager
async def _asking(
    server: Served, method: str, path: str, body: bytes = b"", identifier: str = ""
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send a request over a new connection, which is aborted at the end, answered or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = server.head(method, path, len(body)).removesuffix(b"\r\n")
    chosen = f"x-request-id: {identifier}\r\n" if identifier else ""
    try:
        writer.write(head + f"connection: close\r\n{chosen}\r\n".encode() + body)
        await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()


async def _answered(server: Served, body: bytes) -> None:
    async with _asking(server, "POST", "/v1/generate", body) as (reader, _):
        answer = await reader.read()
    status = int(answer.split(maxsplit=2)[1]) if answer else 0
    if not 200 <= status < 500:
        raise BrokenServer(f"status {status} for {body[:200]!r}")


async def ordinary(server: Served, random: Random) -> None:
    """Requests an image of random size."""
    size = {"width": random.choice(SIZES), "height": random.choice(SIZES)}
    await _answered(server, json.dumps(_fields(random) | size).encode())


async def upload(server: Served, random: Random) -> None:
    """Requests image to image or inpainting, or uploads a file that is slow or large to decode."""
    files = [_picture(random) for _ in range(4)] + BOMBS
    body = _fields(random) | {"image": base64.b64encode(random.choice(files)).decode()}
    if random.random() < 0.3:
        body["mask"] = base64.b64encode(_picture(random)).decode()
    await _answered(server, json.dumps(body).encode())


async def cancels(server: Served, random: Random) -> None:
    """Cancels its request."""
    identifier = f"soak-{uuid4().hex}"
    body = json.dumps(_fields(random) | {"steps": 30}).encode()
    async with _asking(server, "POST", "/v1/generate", body, identifier) as (reader, _):
        await asyncio.sleep(random.random() / 2)
        async with _asking(server, "DELETE", f"/v1/generate/{identifier}") as (said, _):
            await said.read()
        await reader.read()


async def disconnects(server: Served, random: Random) -> None:
    """Disconnects before the response, or in the middle of the events."""
    fields = _fields(random) | {"steps": 30, "stream": random.random() < 0.5}
    body = json.dumps(fields).encode()
    async with _asking(server, "POST", "/v1/generate", body) as (reader, _):
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.readexactly(2000), random.random())


async def half_a_body(server: Served, random: Random) -> None:
    """Announces a large body and disconnects in the middle of it."""
    async with _asking(server, "POST", "/v1/generate") as (_, writer):
        writer.write(server.head("POST", "/v1/generate", 2**24))
        writer.write(b'{"image": "' + random.randbytes(2**16).hex().encode())
        await asyncio.sleep(random.random())


async def floods(server: Served, random: Random) -> None:
    """Sends many requests at once, most of which are refused."""
    body = json.dumps(_fields(random)).encode()
    await asyncio.gather(*(_answered(server, body) for _ in range(FLOOD)))


# Live streams.


@asynccontextmanager
async def _stream(server: Served) -> AsyncGenerator[ClientConnection]:
    address = f"ws://127.0.0.1:{server.port}/v1/stream"
    async with connect(
        address, additional_headers=AUTHORIZATION, max_size=None, close_timeout=1
    ) as socket:
        yield socket


async def streams(server: Served, random: Random) -> None:
    """Sends frames and reads images, with changing settings and pauses."""
    async with _stream(server) as socket:
        await socket.send(json.dumps(_fields(random)))
        reading = asyncio.create_task(_read(socket))
        for number in range(30):
            await socket.send(_picture(random))
            if number % 10 == 5:
                changed = _fields(random) | {"transition_frames": 5, "paused": number == 15}
                await socket.send(json.dumps(changed))
            await asyncio.sleep(0.1)
        reading.cancel()


async def streams_text(server: Served, random: Random) -> None:
    """Reads images generated from the prompt alone, and vanishes."""
    async with _stream(server) as socket:
        await socket.send(json.dumps(_fields(random) | {"source": "text", "seed_step": 1}))
        with suppress(TimeoutError):
            await asyncio.wait_for(_read(socket), 2)
        socket.transport.abort()


async def never_reads(server: Served, random: Random) -> None:
    """Sends frames, reads nothing, and vanishes in the middle of a frame."""
    async with _stream(server) as socket:
        socket.transport.pause_reading()
        await socket.send(json.dumps(_fields(random) | {"output_format": "png"}))
        for _ in range(20):
            await socket.send(_picture(random))
            await asyncio.sleep(0.1)
        # The header of a frame of 4096 bytes, none of which follow.
        socket.transport.write(b"\x82\xfe\x10\x00")
        await asyncio.sleep(0.1)
        socket.transport.abort()


async def sends_garbage(server: Served, random: Random) -> None:
    """Sends data that is neither settings nor an image, between valid frames."""
    nonsense = (
        "{",
        "[]",
        '{"steps": "many"}',
        '{"prompt": "x", "unknown": 1}',
        random.randbytes(5000),
        _picture(random)[:300],
        *BOMBS,
    )
    async with _stream(server) as socket:
        await socket.send(json.dumps(_fields(random)))
        reading = asyncio.create_task(_read(socket))
        for one in random.sample(nonsense, 5):
            await socket.send(one)
            await socket.send(_picture(random))
            await asyncio.sleep(0.1)
        reading.cancel()


async def says_nothing(server: Served, random: Random) -> None:
    """Opens a stream, sends nothing, and vanishes."""
    async with _stream(server) as socket:
        await asyncio.sleep(random.random())
        socket.transport.abort()


async def _read(socket: ClientConnection) -> None:
    async for _ in socket:
        pass


async def _unless_refused(work: Awaitable[None]) -> None:
    """Ignore errors of clients that vanish or are refused, which are not failures."""
    with suppress(ConnectionClosed, InvalidHandshake, ConnectionError, asyncio.IncompleteReadError):
        await work


def _tolerant(
    kind: Callable[[Served, Random], Awaitable[None]],
) -> Callable[[Served, Random], Awaitable[None]]:
    return lambda server, random: _unless_refused(kind(server, random))


KINDS: Final = {
    kind.__name__: _tolerant(kind)
    for kind in (
        ordinary, upload, cancels, disconnects, half_a_body, floods,
        streams, streams_text, never_reads, sends_garbage, says_nothing,
    )
}  # fmt: skip
"""Every kind of client, by name; each is one visit to a server."""

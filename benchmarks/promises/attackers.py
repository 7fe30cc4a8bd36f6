"""Malicious clients, in a process of their own so that they do not slow the measurement."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from time import monotonic
from typing import TYPE_CHECKING, Final

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from multiprocessing.synchronize import Event

    from benchmarks.real_server import Served

__all__ = [
    "BODIES",
    "BOMBS",
    "FORM",
    "SLOW_PICTURE",
    "TURN_S",
    "attack",
    "form_with",
    "picture",
    "request_with",
]

MIB: Final = 2**20
TURN_S: Final = 1.0
START_S: Final = 60
FIELDS: Final = 300_000
"""Number of unknown fields; more would block the weakened server for too long."""


def request_with(picture: bytes) -> bytes:
    """A valid request that starts from a picture."""
    fields = b'{"prompt": "x", "steps": 1, "strength": 1, "width": 64, "height": 64, "image": "'
    return fields + base64.b64encode(picture) + b'"}'


FORM: Final = {"content-type": "multipart/form-data; boundary=edge"}
"""The header of :func:`form_with`."""


def form_with(name: str, text: str) -> bytes:
    """A form with a prompt, and a valid picture whose file has this name."""
    quoted = name.replace("\x00", "%00").replace("\\", "\\\\")
    lines = (
        b"--edge",
        b'Content-Disposition: form-data; name="prompt"\r\n',
        text.encode(),
        b"--edge",
        f'Content-Disposition: form-data; name="image"; filename="{quoted}"'.encode(),
        b"Content-Type: image/png\r\n",
        picture(),
        b"--edge--\r\n",
    )
    return b"\r\n".join(lines)


BODIES: Final[Mapping[str, Callable[[], bytes]]] = {
    "many unknown fields": lambda: (
        b'{"prompt": "x", ' + b",".join(b'"f%d": 1' % k for k in range(FIELDS)) + b"}"
    ),
    "a long field name": lambda: b'{"prompt": "x", "' + b"x" * (28 * MIB) + b'": 1}',
    "a long name": lambda: b'{"prompt": "x", "sampler": "' + b"x" * (28 * MIB) + b'"}',
    "a long prompt": lambda: b'{"prompt": "' + b"x" * (28 * MIB) + b'"}',
    "escapes": lambda: b'{"prompt": "x", "image": "' + b"\\n" * (14 * MIB) + b'"}',
    "accents": lambda: b'{"prompt": "x", "image": "' + "é".encode() * (14 * MIB) + b'"}',
    "numbers": lambda: b'{"prompt": "x", "spacing": [' + b"1," * (2 * MIB) + b"1]}",
    "no base64": lambda: b'{"prompt": "x", "image": "' + b"%" * (28 * MIB) + b'"}',
    "a large picture": lambda: request_with(_noise()),
    "scans": lambda: request_with(_repeated_scans(4096, 2048, 300)),
}
SLOW_PICTURE: Final = "many scans"
_MORE: Final = {SLOW_PICTURE: lambda: request_with(_repeated_scans(4096, 2048, 2000))}


def picture() -> bytes:
    """A valid picture."""
    return _png(64, 64, 8)


BOMBS: Final[Mapping[str, Callable[[], bytes]]] = {
    "a JPEG of 200 scans": lambda: _repeated_scans(4096, 2048, 200),
    "a PNG of 1 x 8388608": lambda: _png(1, 8 * MIB, 1),
    "a PNG of 8388608 x 1": lambda: _png(8 * MIB, 1, 1),
    "a PNG of 20000 x 20000": lambda: _png(20000, 20000, 1),
    "a WebP of 16383 x 16383": lambda: _webp_header(16383),
    "a PNG that ends early": lambda: _png(2048, 2048, 8)[:200],
}
"""Small files that are large or slow to decode, and take a second to create."""


@contextmanager
def attack(server: Served, names: Sequence[str], clients: int) -> Generator[None]:
    """Post these bodies in turn without pause, each for `TURN_S` seconds, in a cycle.

    Args:
        server: the target.
        names: names in `BODIES`, or `SLOW_PICTURE`.
        clients: number of clients that post at the same time, in a process of their own.
    """
    context = get_context("spawn")
    begun = context.Event()
    attacker = context.Process(
        target=_post_in_turn, args=(server, names, clients, begun), daemon=True
    )
    attacker.start()
    try:
        if not begun.wait(START_S):
            raise TimeoutError("the attackers did not start")
        yield
    finally:
        attacker.kill()
        attacker.join()


def _post_in_turn(server: Served, names: Sequence[str], clients: int, begun: Event) -> None:
    bodies = BODIES | _MORE
    with ThreadPoolExecutor(clients) as threads:
        while True:
            for name in names:
                body = bodies[name]()
                begun.set()
                until = monotonic() + TURN_S
                for posting in [threads.submit(_post, server, body, until) for _ in range(clients)]:
                    posting.result()


def _post(server: Served, body: bytes, until: float) -> None:
    while monotonic() < until:
        with suppress(OSError), server.connect() as client:
            with suppress(OSError):
                client.sendall(server.head("POST", "/v1/generate", len(body)))
                client.sendall(body)
            client.recv(65536)


def _noise() -> bytes:
    pixels = Image.frombytes("RGB", (1400, 1400), os.urandom(3 * 1400 * 1400))
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _repeated_scans(width: int, height: int, times: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (100, 150, 200)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    begin, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[begin:end] * times + data[end:]


def _png(width: int, height: int, depth: int) -> bytes:
    row = 1 + -(-width * depth // 8)
    packer = zlib.compressobj(9)
    data = packer.compress(bytes(row * height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _webp_header(side: int) -> bytes:
    body = bytes(4) + (side - 1).to_bytes(3, "little") * 2
    chunk = b"VP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk

"""A client of live streams over a real socket, and frames for it."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.sync.client import ClientConnection, connect

PATIENCE_S = 60
SMALL = {
    "prompt": "a red circle",
    "steps": 2,
    "seed": 5,
    "width": 64,
    "height": 64,
    "output_format": "png",
    "max_fps": 1000,
}
"""Settings of a stream whose frames are cheap and can be compared bit for bit."""


class Output(NamedTuple):
    """A header and the image that belongs to it."""

    header: dict[str, Any]
    image: bytes

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return pixels_of(self.image)


class StreamClient:
    """Speaks the protocol of docs/streaming.md."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def settings(self, **fields: Any) -> dict[str, Any]:
        """Change settings; return the next message, which is the answer if nothing is running."""
        self.tell(json.dumps(fields))
        return self.heard()

    def tell(self, message: str | bytes) -> None:
        self.socket.send(message)

    def heard(self) -> dict[str, Any]:
        """The next message, which must be JSON."""
        said = self.socket.recv(PATIENCE_S)
        assert isinstance(said, str)
        return json.loads(said)

    def statistics(self) -> dict[str, Any]:
        """The next statistics; nothing else may come before them."""
        return self.heard()["stats"]

    def output(self) -> Output:
        """The next output frame; nothing but statistics may come before it."""
        header = self.heard()
        while "stats" in header:
            header = self.heard()
        assert "frame" in header, header
        assert "error" not in header, header
        image = self.socket.recv(PATIENCE_S)
        assert isinstance(image, bytes)
        return Output(header, image)

    def turned(self, frame: bytes) -> Output:
        """The output of a frame, while no other is in progress."""
        self.tell(frame)
        return self.output()


@contextmanager
def opened(url: str, **options: Any) -> Generator[StreamClient]:
    """A socket to the server at an `http://` address."""
    address = url.replace("http", "ws", 1) + "/v1/stream"
    given: dict[str, Any] = {
        "max_size": None,
        "open_timeout": PATIENCE_S,
        "close_timeout": 1,
    } | options
    with connect(address, **given) as socket:
        yield StreamClient(socket)


def file_of(
    shade: int, size: tuple[int, int] = (128, 128), kind: str = "PNG", bar: int = 40
) -> bytes:
    """An image file with a bar on a plain ground."""
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[:, bar : bar + 30] = (250, 60, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(image: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))

"""The uvicorn WebSocket protocol of live streams: avoids stale frames and lingering connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any, Final

from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame
from websockets.protocol import State

from server.settings import StreamLimits

__all__ = ["websocket_options"]

UNSENT_BYTES: Final = 16 * 1024
"""Unsent bytes that the kernel may buffer. By default it would buffer up to 4 MB of frames for a
client that reads slowly, which would see them seconds late."""

LINGER_S: Final = 5.0
"""Maximum seconds from the end of a stream to the end of its connection."""

MIN_MESSAGE_BYTES: Final = 2**20
"""Minimum of the maximum message size, which leaves room for any settings."""


MAX_FRAGMENTS: Final = 4096
"""Maximum number of fragments in a message: empty ones do not count in its size, but each is an
object in memory."""


class StreamProtocol(WebSocketsSansIOProtocol):
    """A WebSocket that buffers few bytes for its client and closes soon after its stream ends.

    While a client does not read, only its last ping waits for an answer (RFC 6455, section 5.5.3,
    allows it). The server goes on reading meanwhile: otherwise input frames would become stale.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._waiting_pong = b""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # By default asyncio buffers 64 KB more. With 0, only the rest of one message waits here.
        self.transport.set_write_buffer_limits(high=0)
        connection = transport.get_extra_info("socket")
        internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if internet and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    @override
    def handle_ping(self) -> None:
        if self.writable.is_set() or self.conn.state is not State.OPEN:
            super().handle_ping()
        elif pongs := self.conn.data_to_send():
            self._waiting_pong = pongs[-1]

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        pong, self._waiting_pong = self._waiting_pong, b""
        if pong and self.conn.state is State.OPEN:
            self.transport.write(pong)

    @override
    def handle_cont(self, event: Frame) -> None:
        if self.close_sent:
            return
        if len(self.frames) == MAX_FRAGMENTS:
            self.frames = []
            self.conn.fail(
                CloseCode.MESSAGE_TOO_BIG, f"message has more than {MAX_FRAGMENTS} fragments"
            )
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    @override
    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        # A normal close waits until the client has read everything, which it may never do.
        self.loop.call_later(LINGER_S, self.transport.abort)


def websocket_options(limits: StreamLimits) -> Mapping[str, Any]:
    """Return the options of `uvicorn.Config` for streams.

    Args:
        limits: limits of streams, set by the operator.
    """
    return {
        "ws": StreamProtocol,
        # A frame slightly above the limit gets an error message; only one far above ends the
        # stream.
        "ws_max_size": max(MIN_MESSAGE_BYTES, 2 * limits.frame_bytes),
        # Compressing image files takes milliseconds and does not make them smaller.
        "ws_per_message_deflate": False,
    }

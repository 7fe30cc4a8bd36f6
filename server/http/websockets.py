"""Sockets of live streams as uvicorn serves them: no stale frames, and no end that lasts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any, Final

from typing_extensions import override
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.settings import StreamLimits

__all__ = ["websocket_options"]

UNSENT_BYTES: Final = 16 * 1024
"""That the kernel keeps beyond what is on its way. By itself it would keep up to 4 MB of frames
for a client that reads slowly, which would see them seconds late."""

LINGER_S: Final = 5.0
"""From the end of a stream to the end of its connection, whether or not the client reads."""

LEAST_MESSAGE_BYTES: Final = 2**20
"""Room for any settings."""


class StreamProtocol(WebSocketsSansIOProtocol):
    """A socket that keeps few bytes for its client, and is gone soon after its stream ends."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Of its own, asyncio would keep 64 KB more: nothing waits here but the rest of one message.
        self.transport.set_write_buffer_limits(high=0)
        connection = transport.get_extra_info("socket")
        internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if internet and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    @override
    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        # Closing waits until the client has read everything, which it may never do.
        self.loop.call_later(LINGER_S, self.transport.abort)


def websocket_options(limits: StreamLimits) -> Mapping[str, Any]:
    """Options of `uvicorn.Config` for streams.

    Args:
        limits: the operator's.
    """
    return {
        "ws": StreamProtocol,
        # A frame that is a little too large gets a sentence; only one far beyond ends the stream.
        "ws_max_size": max(LEAST_MESSAGE_BYTES, 2 * limits.frame_bytes),
        # Image files do not get smaller, and deflating them costs milliseconds.
        "ws_per_message_deflate": False,
    }

"""A client's connection, with limits on the size of headers and on slow sending and reading.

uvicorn limits neither the size nor the duration of a request's headers, waits forever for a client
that does not read, and answers what it cannot parse in plain text. docs/operating.md compares
servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.errors import (
    HeadersTooLarge,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    WeftError,
)
from server.http.errors import answer
from server.settings import Settings

__all__ = ["Connection", "connections"]

HEAD_BYTES: Final = 32 * 2**10
"""Maximum bytes of a request line and its headers; browsers and proxies stay below 16 KiB."""

HEAD_FIELDS: Final = 128

LINGER_S: Final = 10.0
"""Seconds in which a client may finish sending a request that was answered early, and read the
answer."""

RETRY_AFTER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits: seconds for headers and for a client that stops reading, and maximum connections."""

    headers_s: float
    write_s: float
    connections: int


def connections(settings: Settings) -> type[asyncio.Protocol]:
    """Return the protocol class that a uvicorn server uses for each connection."""
    patience = Patience(settings.headers_s, settings.write_s, settings.max_connections)
    # uvicorn only calls it.
    return cast("type[asyncio.Protocol]", partial(Connection, patience=patience))


class Connection(HttpToolsProtocol):
    """A connection that ends if its client is too slow, or makes room while it has no full request.

    Args:
        config: uvicorn's configuration.
        server_state: uvicorn's state, which holds all connections.
        app_state: uvicorn's state of the application.
        patience: limits.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        patience: Patience,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.waiting_since: float | None = None
        self._patience = patience
        self._refused = False
        self._in_head = False
        self._in_body = False
        self._read_ended_one = False
        self._unfinished_bytes = 0
        self._head_bytes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request; with too many connections, drop another one that waits."""
        super().connection_made(transport)
        # Anything that is not written at once is watched.
        transport.set_write_buffer_limits(high=0)
        self._wait_for_request()
        most = self._patience.connections
        if len(self.connections) > most and not self._make_room():
            self._refuse(
                Overloaded(
                    RETRY_AFTER_S,
                    f"{most} connections are open, which is the maximum; try again in "
                    f"{RETRY_AFTER_S:.0f} s.",
                )
            )
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive data, unless the connection was refused already."""
        if self._refused:
            return
        if not self._in_body and "head" not in self._timers:
            self._start("head", self._patience.headers_s, self._head_is_late)
        self._read_ended_one = False
        super().data_received(data)
        if self._in_head:
            # In a read that also ends another request, it is not known where the headers begin, but
            # their parsed bytes are.
            self._unfinished_bytes += self._head_bytes if self._read_ended_one else len(data)
            if self._unfinished_bytes > HEAD_BYTES:
                self._refuse(HeadersTooLarge(HEAD_BYTES, HEAD_FIELDS))

    def on_message_begin(self) -> None:
        """Start to count the headers."""
        super().on_message_begin()
        self._in_head = True
        self._unfinished_bytes = self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count a part of the request's URL."""
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header or a trailer."""
        if self._refused:
            return
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if not self._in_head and self._head_is_large():
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """Serve the request if its headers are within the limits and nothing was refused."""
        self._in_head = False
        if self._refused:
            # A single read may contain more requests after the refused one.
            return
        self._stop("head")
        if self._head_is_large():
            self._refuse(HeadersTooLarge(HEAD_BYTES, HEAD_FIELDS))
            return
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete: from now on the connection is not dropped to make room."""
        if self._refused:
            return
        self._in_body = False
        self._read_ended_one = True
        self._stop("linger")
        if self._responding():
            self.waiting_since = None
        else:
            # It was answered before it was complete.
            self._wait_for_request()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered early."""
        super().on_response_complete()
        if self._responding():
            # uvicorn has started a pipelined request; `cycle` is the last one that was parsed.
            if self._in_body:
                self.waiting_since = self.loop.time()
            return
        self.waiting_since = self.loop.time()
        if self._in_body:
            self._start("linger", LINGER_S, self.transport.abort)

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over to the WebSocket protocol, which has limits of its own."""
        if self._refused:
            return
        self._stop_timers()
        self.transport.set_write_buffer_limits()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Start to watch whether the client reads."""
        super().pause_writing()
        self._watch_reader(left=self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read everything."""
        self._stop("write")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the same format as all errors."""
        self._refuse(MalformedRequest())

    def _wait_for_request(self) -> None:
        self.waiting_since = self.loop.time()
        self._start("head", self._patience.headers_s, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._responding():
            self._start("head", self._patience.headers_s, self._head_is_late)
        elif self._in_head:
            seconds = self._patience.headers_s
            self._refuse(RequestTimeout(f"The headers did not arrive within {seconds:g} s."))
        else:
            self.transport.close()

    def _head_is_large(self) -> bool:
        return self._head_bytes > HEAD_BYTES or len(self.headers) > HEAD_FIELDS

    def _responding(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _make_room(self) -> bool:
        """Drop the connection that has waited longest for a request; False if none waits."""
        waiting = [
            (one.waiting_since, id(one), one)
            for one in self.connections
            if isinstance(one, Connection) and one.waiting_since is not None and one is not self
        ]
        if not waiting:
            return False
        oldest = min(waiting)[2]
        oldest.waiting_since = None
        # Its transport reports the loss later, but its slot is free now.
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _watch_reader(self, left: int) -> None:
        def look() -> None:
            now_left = self.transport.get_write_buffer_size()
            if now_left >= left:
                self.transport.abort()
            else:
                self._watch_reader(now_left)

        self._start("write", self._patience.write_s, look)

    def _refuse(self, error: WeftError) -> None:
        """Answer with an error, and close the connection after the client had time to read it."""
        if self._refused:
            return
        if self._responding():
            self.transport.abort()
            return
        self._refused = True
        self._stop_timers()
        response = answer(error)
        lines = [
            f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()
        ]
        lines += [name + b": " + value for name, value in response.raw_headers]
        lines += [b"connection: close", b"", bytes(response.body)]
        self.transport.write(b"\r\n".join(lines))
        self.transport.write_eof()
        self._start("linger", LINGER_S, self.transport.abort)

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, self._ring, name, then)

    def _ring(self, name: str, then: Callable[[], None]) -> None:
        self._timers.pop(name, None)
        then()

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

    def _stop_timers(self) -> None:
        for name in tuple(self._timers):
            self._stop(name)

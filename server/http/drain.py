"""How the server stops without dropping anybody: refuse, finish, say goodbye, leave."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Final

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import NotReady, WeftError
from server.service.service import Service
from server.settings import Settings

__all__ = ["CLOSE_S", "FAREWELL_S", "DrainingServer", "Farewell"]

log = logging.getLogger("weft")

FAREWELL_S: Final = 3.0
"""Kept of the grace time to end what is unfinished by then: answers, connections, the engine."""

CLOSE_S: Final = 1
"""Of these, the most seconds for connections to take their last answer."""


class DrainingServer(uvicorn.Server):
    """A server that a signal turns into a lame duck, and a second one ends at once.

    From the signal on the listener stays open, `/readyz` says 503 and new requests are refused,
    while those under way go on, for as long as there are any and for `drain_s` seconds at most.
    What is unfinished then ends with an error that says so.

    Args:
        config: of uvicorn.
        service: whose requests are drained.
        settings: `drain_s` and `lame_duck_s`.
    """

    def __init__(self, config: uvicorn.Config, service: Service, settings: Settings) -> None:
        super().__init__(config)
        self._service = service
        self._settings = settings
        self._leaves_at: float | None = None
        self._ends_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, end."""
        now = monotonic()
        if self._leaves_at is not None:
            self._ends_at = now
            return
        # Whoever presses Ctrl-C is not a load balancer that has yet to hear of it.
        patience = self._settings.lame_duck_s if sig == signal.SIGTERM else 0.0
        self._ends_at = now + max(0.0, self._settings.drain_s - FAREWELL_S)
        self._leaves_at = min(now + patience, self._ends_at)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop listening now; called ten times a second."""
        if self._leaves_at is not None and not self.should_exit:
            self.should_exit = self._drained(self._leaves_at)
        return await super().on_tick(counter)

    def _drained(self, leaves_at: float) -> bool:
        if not self._service.leaving.is_set():
            self._service.drain()
            log.info(
                "stopping: new requests are refused, %d under way may finish; "
                "another signal ends them",
                len(self.server_state.tasks),
            )
        now = monotonic()
        if now < leaves_at and now < self._ends_at:
            return False
        if self.server_state.tasks and now < self._ends_at:
            return False
        self._service.abandon()
        return True


class Farewell:
    """Tells a request that is cut off because the server stops, instead of a bare error.

    It is for those that nothing else can end, such as one whose body has not arrived.

    Args:
        app: what serves the request.
        answer: turns an error into a response.
    """

    def __init__(self, app: ASGIApp, answer: Callable[[WeftError, str], Response]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            # uvicorn cancels what is still running when its time is up, and at no other time.
            if not started:
                error = NotReady("The server stopped before it had the whole request.")
                await self._answer(error, scope["path"])(scope, receive, send)

"""Graceful shutdown: refuse new requests, finish running ones, answer the rest, and exit."""

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

__all__ = ["CLOSE_S", "RESPONSE_GRACE_S", "DrainMiddleware", "DrainingServer"]

log = logging.getLogger("weft")

RESPONSE_GRACE_S: Final = 3.0
"""Part of the grace period that is reserved to end unfinished responses, connections and the
engine."""

CLOSE_S: Final = 1
"""Maximum seconds of `RESPONSE_GRACE_S` for connections to receive their last response."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains at the first signal and ends at once at the second.

    After the signal the listener stays open, `/readyz` answers 503 and new requests are refused.
    Running requests continue until they end, for at most `drain_s` seconds. Those that are
    unfinished then end with an error that says so.

    Args:
        config: uvicorn's configuration.
        service: service whose requests are drained.
        settings: settings with `drain_s` and `lame_duck_s`.
    """

    def __init__(self, config: uvicorn.Config, service: Service, settings: Settings) -> None:
        super().__init__(config)
        self._service = service
        self._settings = settings
        self._leaves_at: float | None = None
        self._ends_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain at the first signal; end at the second."""
        now = monotonic()
        if self._leaves_at is not None:
            self._ends_at = now
            return
        # After Ctrl-C no load balancer has to notice that the server is leaving.
        patience = self._settings.lame_duck_s if sig == signal.SIGTERM else 0.0
        self._ends_at = now + max(0.0, self._settings.drain_s - RESPONSE_GRACE_S)
        self._leaves_at = min(now + patience, self._ends_at)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop listening now; called ten times a second."""
        if self._leaves_at is not None and not self.should_exit:
            self.should_exit = self._drained(self._leaves_at)
        return await super().on_tick(counter)

    def _drained(self, leaves_at: float) -> bool:
        if not self._service.leaving.is_set():
            self._service.drain()
            log.info(
                "stopping: new requests are refused, %d running ones may finish; another signal "
                "ends them",
                len(self.server_state.tasks),
            )
        now = monotonic()
        if now < leaves_at and now < self._ends_at:
            return False
        if self.server_state.tasks and now < self._ends_at:
            return False
        self._service.abandon()
        return True


class DrainMiddleware:
    """Middleware that answers requests which are cut off by the shutdown with a proper error.

    It is for requests that nothing else can end, such as one whose body has not arrived.

    Args:
        app: application that serves the request.
        answer: function that turns an error into a response.
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
            # uvicorn cancels requests only when the time for the shutdown is over.
            if not started:
                error = NotReady("The server stopped before the whole request had arrived.")
                await self._answer(error, scope["path"])(scope, receive, send)

"""`GET /v1/rows`: the rows in the engine's forward passes, live, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from time import monotonic
from typing import Any, Final

from fastapi import APIRouter
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from server.engine.row_watch import SAMPLE_INTERVAL_S, RowWatch
from server.errors import Overloaded
from server.http.dependencies import ServiceDep
from server.http.errors import ErrorBody
from server.http.native.events import PING_S
from server.service.service import Service

__all__ = ["MAX_WATCHERS", "router"]

MAX_WATCHERS: Final = 8
"""Maximum number of streams of rows that are open at once; more are refused."""

MAX_RESPONSE_S: Final = 600.0
"""Seconds after which a stream ends, so that a forgotten page does not watch forever; clients may
reconnect."""

router = APIRouter(tags=["rows"])

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **{status: {"model": ErrorBody} for status in (401, 403, 429, 503)},
}


@router.get("/v1/rows", response_model=None, responses=_RESPONSES)
async def watch_rows(service: ServiceDep) -> EventSourceResponse:
    """Watch the rows in the engine's forward passes: a sample of at most five passes a second.

    Each event `tick` has the number of the forward pass, its model, its duration in seconds, the
    number of waiting images, and for every image in it the number of its request, timestep, step,
    rule, policy and what each of its rows predicts (`branches`). Prompts are not included. The
    stream ends after ten minutes; while nobody watches, nothing is recorded.
    """
    watch = service.ready_engine().row_watch
    if watch.watchers >= MAX_WATCHERS:
        raise Overloaded(
            PING_S, f"At most {MAX_WATCHERS} streams of rows are open at once; try again later."
        )
    return RowEvents(service, watch)


class RowEvents(EventSourceResponse):
    """The event stream of a row watch, which ends when the connection does.

    Args:
        service: service, which ends the stream when it stops.
        watch: watch whose samples are sent.
    """

    def __init__(self, service: Service, watch: RowWatch) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers)
        self._service = service
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with self._watch.watching():
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[bytes]:
        # Sent at once, so that a client knows that the stream is open even if no tick runs.
        yield KEEPALIVE_COMMENT
        seen, began = self._watch.latest, monotonic()
        spoke_at = began
        while not self._service.leaving.is_set() and (now := monotonic()) < began + MAX_RESPONSE_S:
            if (latest := self._watch.latest) is not None and latest is not seen:
                seen, spoke_at = latest, now
                yield format_sse_event(event="tick", data_str=json.dumps(asdict(latest)))
            elif now > spoke_at + PING_S:
                spoke_at = now
                yield KEEPALIVE_COMMENT
            await asyncio.sleep(SAMPLE_INTERVAL_S / 2)

"""Server-sent events of a generation."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.errors import WeftError
from server.http.errors import body_of
from server.http.native.answers import PositionEvent, completed, progressed, queued
from server.http.results import Link
from server.service.generation import Generation
from server.service.pictures import Pictures
from server.service.service import Service

__all__ = ["GenerationStream", "Linking"]

Linking: TypeAlias = "Callable[[Generation, Pictures], Awaitable[list[Link] | None]]"
"""Function that gives the images of a generation URLs; returns None if the events contain them."""

PING_S: Final = 15.0
"""Seconds of silence after which a stream sends a keep-alive comment."""

QUEUE_POLL_S: Final = 1.0
"""Seconds between checks of a waiting request's position in the queue."""


async def _in_the_answer(generation: Generation, pictures: Pictures) -> None:
    """No links: the events contain the images."""


class GenerationStream(EventSourceResponse):
    """The event stream of one generation, which ends when the connection does.

    Args:
        service: service that makes the images.
        generation: admitted generation.
        linking: function that gives the images URLs, if these were requested.
    """

    def __init__(
        self, service: Service, generation: Generation, linking: Linking = _in_the_answer
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers)
        self._service = service
        self._generation = generation
        self._linking = linking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.release(self._generation)

    async def _events(self) -> AsyncIterator[bytes]:
        generation = self._generation
        shown = queued(generation)
        yield _event("queued", shown)
        try:
            async for event in self._of_the_queue(shown.queue_position):
                yield event
            while not generation.done:
                news = await generation.news(PING_S)
                for progress in news:
                    yield _event("progress", await asyncio.to_thread(progressed, progress))
                if not news and not generation.done:
                    yield KEEPALIVE_COMMENT
            pictures = await self._service.pictures(generation)
            links = await self._linking(generation, pictures)
            yield _event("completed", completed(generation, pictures, links))
        except WeftError as error:
            yield format_sse_event(event="error", data_str=json.dumps(body_of(error)))

    async def _of_the_queue(self, shown: int | None) -> AsyncIterator[bytes]:
        """Yield an event at each change of the position in the queue, until it leaves the queue."""
        spoke = time.monotonic()
        while (position := self._generation.queue_position) is not None:
            if position != shown:
                shown, spoke = position, time.monotonic()
                yield _event("position", PositionEvent(queue_position=position))
            elif time.monotonic() - spoke > PING_S:
                spoke = time.monotonic()
                yield KEEPALIVE_COMMENT
            await self._generation.begun(QUEUE_POLL_S)


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json())

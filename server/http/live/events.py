"""`POST /v1/stream`: images of a prompt as server-sent events, for clients without WebSockets."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from server.errors import InvalidRequest, WeftError
from server.http.body import JsonRoute
from server.http.errors import ErrorBody, body_of
from server.http.live.statistics_clock import StatisticsClock
from server.http.live.stream import failure, header
from server.http.making import cancel_on_disconnect
from server.http.native.events import PING_S
from server.image_codec import MEDIA_TYPES
from server.requests.stream_schema import IMAGE_FIELDS, StreamSettings
from server.service.stream import StreamSession
from server.service.stream_frame import FailedFrame, OutputFrame
from server.service.streams import Streams

__all__ = ["router"]


class StreamRoute(JsonRoute):
    """A route for streams, which have their own metrics."""

    counted = False


router = APIRouter(tags=["stream"], route_class=StreamRoute)

WITHOUT_EFFECT: Final = ("paused", "similarity_filter", "transition_frames")
"""Fields about input frames or later changes, which do not exist here."""

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **{
        status: {"model": ErrorBody}
        for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 507)
    },
}


@router.post("/v1/stream", response_model=None, responses=_RESPONSES)
async def stream_events(body: StreamSettings, request: Request) -> Response:
    """Stream images of a prompt, each with a different seed.

    The events are `settings`, then `frame` for each image (a data URI in `image`), `stats` every
    `stats_s` seconds, and `error`. The stream continues until the client disconnects. Streams with
    input frames or changing settings need the WebSocket at the same path.
    """
    fields = _of_text(body)
    streams: Streams = request.app.state.streams
    session = streams.open(request.scope["state"].get("api_key"))
    try:
        # The model may have to be loaded first.
        said = await cancel_on_disconnect(request, session.change(fields))
        if said is None:
            streams.close(session)
            return Response(status_code=499)
        return FrameEvents(streams, session, said)
    except BaseException:
        streams.close(session)
        raise


class FrameEvents(EventSourceResponse):
    """The event stream of a session, which ends when the connection does.

    Args:
        streams: streams that the session belongs to.
        session: session, whose settings have been accepted.
        said: answer to its settings.
    """

    def __init__(self, streams: Streams, session: StreamSession, said: Mapping[str, Any]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(said), headers=headers)
        self._streams = streams
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.close(self._session)

    async def _events(self, said: Mapping[str, Any]) -> AsyncIterator[bytes]:
        yield _event("settings", said)
        stopping = asyncio.create_task(self._streams.until_stopping())
        try:
            async for event in self._frames(stopping):
                yield event
        except WeftError as error:
            yield _event("error", body_of(error))
        finally:
            stopping.cancel()

    async def _frames(self, stopping: asyncio.Task[None]) -> AsyncIterator[bytes]:
        session, clock = self._session, StatisticsClock()
        upcoming = asyncio.create_task(session.next())
        try:
            while True:
                left = clock.left(session.stats_s)
                if left == 0:
                    clock.mark_sent()
                    yield _event("stats", {"stats": session.statistics()})
                silent_s = PING_S if left is None else min(PING_S, left)
                await asyncio.wait(
                    {upcoming, stopping}, timeout=silent_s, return_when="FIRST_COMPLETED"
                )
                if stopping.done():
                    await stopping
                if upcoming.done():
                    yield _frame(await upcoming)
                    upcoming = asyncio.create_task(session.next())
                elif silent_s == PING_S:
                    yield KEEPALIVE_COMMENT
        finally:
            upcoming.cancel()


def _of_text(body: StreamSettings) -> dict[str, Any]:
    """Return the settings of a stream of images of one prompt with different seeds.

    Raises:
        InvalidRequest: a setting needs a WebSocket, or makes all images the same.
    """
    given = body.model_fields_set
    if "source" in given and body.source != "text":
        raise InvalidRequest(
            "source",
            f"source is {body.source!r}; input frames need a WebSocket, so open one at /v1/stream "
            "or leave source out.",
        )
    for field in WITHOUT_EFFECT:
        if getattr(body, field):
            raise InvalidRequest(
                field, f"{field} has no effect without a WebSocket at /v1/stream; leave it out."
            )
    if "seed_step" in given and body.seed_step == 0:
        raise InvalidRequest(
            "seed_step", "seed_step is 0, so that all images would be the same; it must be above 0."
        )
    fields = body.model_dump(mode="json", exclude=set(IMAGE_FIELDS), exclude_unset=True)
    pictures = {field: getattr(body, field) for field in IMAGE_FIELDS if getattr(body, field)}
    return {"seed_step": 1, **fields, **pictures, "source": "text"}


def _frame(output: OutputFrame | FailedFrame) -> bytes:
    if isinstance(output, FailedFrame):
        return _event("error", failure(output))
    data = base64.b64encode(output.data).decode()
    image = f"data:{MEDIA_TYPES[output.output_format]};base64,{data}"
    return _event("frame", header(output) | {"image": image})


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))

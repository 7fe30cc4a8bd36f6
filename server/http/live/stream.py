"""`WS /v1/stream`: a live stream over a WebSocket; docs/streaming.md describes the messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from time import monotonic
from typing import Any, Final

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from starlette.types import Message
from starlette.websockets import WebSocketState

from server.errors import NotReady, RequestTimeout, TooLarge, WeftError
from server.http.errors import answer, body_of
from server.http.live.statistics_clock import StatisticsClock
from server.http.text_meter import TextMeter
from server.requests.stream_schema import message_fields
from server.service.stream import StreamSession
from server.service.stream_frame import FailedFrame, OutputFrame
from server.service.streams import Streams

__all__ = ["SUBPROTOCOL", "failure", "header", "router"]

router = APIRouter()

SUBPROTOCOL: Final = "weft.stream"
FIRST_SETTINGS_S: Final = 30.0
CLOSE_S: Final = 1.0
MAX_SETTINGS_CHARACTERS: Final = 256 * 1024
"""Maximum length of a JSON message without pictures: eight prompts of maximum length, with every
byte escaped."""

POLICY_VIOLATION: Final = 1008
INTERNAL_ERROR: Final = 1011
SERVICE_RESTART: Final = 1012
MAX_REASON_BYTES: Final = 120
"""Maximum bytes of the reason in a close frame, which has room for 123."""


class Stalled(Exception):
    """The client does not read the messages that are sent to it."""


DISCONNECTED: Final = (Stalled, WebSocketDisconnect)


@router.websocket("/v1/stream")
async def stream(websocket: WebSocket) -> None:
    """Receive frames and send images."""
    streams: Streams = websocket.app.state.streams
    try:
        session = streams.open(websocket.scope.get("state", {}).get("api_key"))
    except WeftError as refusal:
        await websocket.send_denial_response(answer(refusal))
        return
    try:
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await Conversation(websocket, session, streams).hold()
    finally:
        streams.close(session)


class Conversation:
    """The exchange of messages over one WebSocket.

    Args:
        websocket: accepted WebSocket.
        session: session that receives the frames and settings.
        streams: streams that the session belongs to.
    """

    def __init__(self, websocket: WebSocket, session: StreamSession, streams: Streams) -> None:
        self._websocket = websocket
        self._session = session
        self._streams = streams
        self._limits = streams.limits
        self._writing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._image_owed = False
        self._opened = self._active = monotonic()

    async def hold(self) -> None:
        """Read, write and report until the client disconnects or something ends the session."""
        work = self._read(), self._write(), self._report(), self._streams.until_stopping()
        parts = [asyncio.create_task(one) for one in work]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            outcomes = await asyncio.gather(*parts, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, WeftError):
                await self._say_goodbye(outcome)
            elif isinstance(outcome, Exception) and not isinstance(outcome, DISCONNECTED):
                raise outcome

    async def _read(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            self._active = monotonic()
            text = message.get("text")
            if text is not None:
                await self._change(text)
            elif failed := self._session.offer(message["bytes"]):
                await self._send(failure(failed))

    async def _receive(self) -> Message:
        """Return the next message of the client.

        Raises:
            RequestTimeout: no message arrives in time.
        """
        while (left := self._silent_until() - monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    return await self._websocket.receive()
        if self._session.begun:
            raise RequestTimeout(
                f"Nothing was sent or received for {self._limits.idle_s:g} s; the stream ends."
            )
        raise RequestTimeout(f"No settings arrived within {FIRST_SETTINGS_S:g} s; the stream ends.")

    def _silent_until(self) -> float:
        if self._session.begun:
            return self._active + self._limits.idle_s
        return self._opened + FIRST_SETTINGS_S

    async def _change(self, text: str) -> None:
        try:
            said = await self._session.change(await self._fields_of(text))
        except NotReady:
            raise
        except WeftError as error:
            said = body_of(error)
        await self._send(said)
        self._changed.set()

    async def _fields_of(self, text: str) -> dict[str, Any]:
        """Return the settings in a message, which with pictures may be as long as a frame.

        Raises:
            TooLarge: the message is longer.
            InvalidRequest: the message does not contain settings.
        """
        if len(text) <= MAX_SETTINGS_CHARACTERS:
            return message_fields(text)
        limit = max(MAX_SETTINGS_CHARACTERS, self._limits.frame_bytes)
        if len(text) > limit:
            raise TooLarge(
                None, f"The message has {len(text)} characters; at most {limit} are allowed."
            )
        meter = TextMeter()
        await asyncio.to_thread(meter.feed, text.encode(errors="replace"))
        if meter.too_costly:
            raise TooLarge(
                None,
                f"The message has more than {MAX_SETTINGS_CHARACTERS} characters; only pictures "
                "in base64 may make it longer.",
            )
        return await asyncio.to_thread(message_fields, text)

    async def _write(self) -> None:
        while True:
            output = await self._session.next()
            if isinstance(output, FailedFrame):
                await self._send(failure(output))
            else:
                await self._send(header(output), output.data)
                self._active = monotonic()

    async def _report(self) -> None:
        clock = StatisticsClock()
        while True:
            self._changed.clear()
            left = clock.left(self._session.stats_s)
            if left == 0:
                clock.mark_sent()
                await self._send({"stats": self._session.statistics()})
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    async def _send(self, said: Mapping[str, Any], image: bytes | None = None) -> None:
        """Send a message and the image that belongs to it.

        Raises:
            Stalled: the client does not read.
            WebSocketDisconnect: the client is gone.
        """
        async with self._writing:
            if self._websocket.application_state is not WebSocketState.CONNECTED:
                raise WebSocketDisconnect
            try:
                async with asyncio.timeout(self._limits.stall_s):
                    await self._websocket.send_text(json.dumps(said))
                    if image is not None:
                        self._image_owed = True
                        await self._websocket.send_bytes(image)
                        self._image_owed = False
            except TimeoutError:
                raise Stalled from None

    async def _say_goodbye(self, error: WeftError) -> None:
        code = INTERNAL_ERROR
        if isinstance(error, NotReady):
            code = SERVICE_RESTART
        elif isinstance(error, RequestTimeout):
            code = POLICY_VIOLATION
        reason = error.message.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        with contextlib.suppress(TimeoutError, *DISCONNECTED):
            async with asyncio.timeout(CLOSE_S):
                if not self._image_owed:
                    await self._send(body_of(error))
                await self._websocket.close(code, reason)


def header(output: OutputFrame) -> dict[str, Any]:
    """Return the message that precedes the image of an output frame."""
    return {
        "frame": output.number,
        "source": output.source,
        "seed": output.seed,
        "skipped": output.skipped,
        "dropped": output.dropped,
        "timings": {
            "queue_s": round(output.queue_s, 4),
            "denoise_s": round(output.denoise_s, 4),
            "decode_s": round(output.decode_s, 4),
            "total_s": round(output.total_s, 4),
        },
    }


def failure(failed: FailedFrame) -> dict[str, Any]:
    """Return the message for a frame without an output."""
    places = {"frame": failed.number, "source": failed.source}
    return body_of(failed.error) | {k: v for k, v in places.items() if v is not None}

"""Reading of request bodies, bounded in time and memory and without blocking the event loop."""

from __future__ import annotations

import asyncio
from asyncio import to_thread
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, Final, Self, get_args, get_origin

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from server.errors import (
    MalformedBody,
    Overloaded,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
    WeftError,
)
from server.heap import return_free_memory
from server.http.dependencies import client_of
from server.http.text_meter import QUOTES, TEXT_BYTES, TextMeter
from server.requests.checks.shape import below, check_shape
from server.requests.upload import Upload
from server.service.generation import outcome_of
from server.service.service import Service
from server.settings import Settings

__all__ = [
    "Bodies",
    "JsonRoute",
    "Share",
    "check_text",
    "make_uploads",
    "media_type",
    "received",
    "uploads_of",
]

SMALL_BYTES: Final = 64 * 2**10
"""Bodies up to this size are always read and not counted; each connection may hold one."""

INLINE_PARSE_BYTES: Final = 2**20
"""Bytes up to which parsing a body takes less time than handing it to a thread; with 32 MB of
base64 the parser holds the GIL for 5 ms."""

RETRY_AFTER_S: Final = 2.0

TRIM_DELAY_S: Final = 2.0
"""Delay before memory is returned to the system, which takes a thread some milliseconds and is
therefore not done after every upload."""


class Bodies:
    """Count of the bytes of large bodies in memory, over all requests.

    Args:
        max_bytes: maximum number of bytes; a body that would exceed it is refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        self._max_bytes = max_bytes
        self._tidying: asyncio.TimerHandle | None = None

    def take(self, count: int) -> None:
        """Reserve `count` more bytes; raise Overloaded if there is no room for them."""
        if self.held + count > self._max_bytes:
            raise Overloaded(
                RETRY_AFTER_S,
                f"Request bodies of {self.held} bytes are being received; with yours there would "
                f"be more than {self._max_bytes}. Try again in {RETRY_AFTER_S:.0f} s.",
            )
        self.held += count

    def release(self, count: int) -> None:
        """Release `count` bytes; once none are held, memory is returned to the system."""
        self.held -= count
        if count and not self.held and self._tidying is None:
            loop = asyncio.get_running_loop()
            self._tidying = loop.call_later(TRIM_DELAY_S, self._tidy, loop)

    def _tidy(self, loop: asyncio.AbstractEventLoop) -> None:
        self._tidying = None
        if not self.held:
            loop.run_in_executor(None, return_free_memory)


class Share:
    """The bytes that one body has reserved; leaving its `with` block releases the rest."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held = 0

    def grow_to(self, count: int) -> None:
        """Reserve `count` bytes in total; raise Overloaded if there is no room for them."""
        if count > max(self._held, SMALL_BYTES):
            self._bodies.take(count - self._held)
            self._held = count

    def hold(self, count: int) -> None:
        """Reserve `count` more bytes until the response, for data that was made from the body.

        Raises:
            Overloaded: there is no room for them.
        """
        self._bodies.take(count)
        self._held += count

    def release(self, count: int) -> None:
        """Release `count` bytes."""
        count = min(count, self._held)
        self._held -= count
        self._bodies.release(count)

    def upload(self, data: str | bytes) -> Upload:
        """Return an upload for a picture of the body; its bytes are released when it is decoded."""
        return Upload(data, partial(self.release, len(data)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(self._held)


class JsonRoute(APIRoute):
    """A route whose JSON body is read here instead of by FastAPI, which limits only its size.

    Attributes:
        counted: whether a refused body counts among the service's outcomes.
    """

    counted: ClassVar[bool] = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that reads the body and then calls FastAPI's handler."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        uploads = uploads_of(self.body_field.field_info.annotation)

        async def read_and_handle(request: Request) -> Response:
            with Share(request.app.state.bodies) as share:
                request.state.share = share
                try:
                    body = await self.read(request, uploads, share)
                except WeftError as refusal:
                    self._count(request, outcome_of(refusal))
                    raise
                except ClientDisconnect:
                    return Response(status_code=499)
                try:
                    return await handle(_WithBody(request, body))
                except RequestValidationError:
                    self._count(request, "invalid")
                    raise

        return read_and_handle

    async def read(self, request: Request, uploads: frozenset[str], share: Share) -> Any:
        """Read and parse the body, with its pictures as uploads; None without a body.

        Args:
            request: request whose body is read.
            uploads: fields that hold pictures, as :func:`uploads_of` returns them.
            share: share that reserves the bytes of the body.

        Raises:
            WeftError: the body is not valid JSON, too large, or too slow.
        """
        _check_media_type(request)
        body = await received(request, share, text=True)
        if not body:
            return None
        try:
            small = len(body) <= INLINE_PARSE_BYTES
            parsed = from_json(body) if small else await to_thread(from_json, body)
        except ValueError as error:
            raise MalformedBody(None, f"The body is not valid JSON: {error}.") from None
        parsed = self.narrowed(parsed)
        self.take_uploads(parsed, uploads, share)
        return parsed

    def take_uploads(
        self, parsed: Any, uploads: frozenset[str], share: Share, path: tuple[str, ...] = ()
    ) -> None:
        """Check the shape of a parsed body and replace its pictures by uploads.

        Args:
            parsed: body, or the part of it that has pictures; changed in place.
            uploads: fields that hold pictures.
            share: share that has reserved their bytes.
            path: path of the part within the body.

        Raises:
            InvalidRequest: an object, a list, a name or a text is larger than any request needs.
        """
        check_shape(parsed, uploads, path)
        make_uploads(parsed, uploads, share)

    def narrowed(self, parsed: Any) -> Any:
        """Return the part of a parsed body that is used: all of it, unless a route overrides it.

        Raises:
            InvalidRequest: it cannot be used.
        """
        return parsed

    def _count(self, request: Request, outcome: str) -> None:
        if self.counted:
            service: Service = request.app.state.service
            service.outcomes[outcome] += 1


class _WithBody(Request):
    """A request whose body has already been read and parsed."""

    def __init__(self, request: Request, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        """Non-empty if there was a body."""
        return b"" if self._parsed is None else b"{}"

    async def json(self) -> Any:
        return self._parsed


async def received(request: Request, share: Share, *, text: bool) -> bytearray:
    """Receive the bytes of a body.

    Args:
        request: request whose body is received.
        share: share that reserves the bytes.
        text: whether the body is JSON, in which the amount of anything but pictures is limited.

    Raises:
        TooLarge: the body has too many bytes, or too many besides its pictures.
        RequestTimeout: the body does not arrive in time.
        NotReady: the server does not accept requests now.
        Overloaded: there is no room for the bytes, or the queue is full.
    """
    settings: Settings = request.app.state.settings
    max_bytes = settings.limits.body_bytes
    announced = request.headers.get("content-length", "0")
    _check_room(request, int(announced), max_bytes)
    body, meter = bytearray(), TextMeter()
    try:
        async with asyncio.timeout(settings.body_s):
            async for chunk in request.stream():
                if len(body) <= SMALL_BYTES:
                    _check_room(request, len(body) + len(chunk), max_bytes)
                share.grow_to(len(body) + len(chunk))
                body += chunk
                if text:
                    meter.feed(chunk)
                    check_text(meter)
                if len(body) > max_bytes:
                    raise TooLarge.body(max_bytes)
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive within {settings.body_s:g} s; send it faster or smaller."
        ) from None
    return body


def _check_room(request: Request, size: int, max_bytes: int) -> None:
    """Refuse a large body that could not be served before it is read.

    Raises:
        TooLarge: it exceeds the maximum size of a body.
        NotReady: the server does not accept requests now.
        Overloaded: the queue is full.
    """
    if size > max_bytes:
        raise TooLarge.body(max_bytes)
    if size > SMALL_BYTES:
        service: Service = request.app.state.service
        service.check_room(client_of(request))


def check_text(meter: TextMeter) -> None:
    """Refuse JSON that would take long to parse.

    Raises:
        TooLarge: it has more text besides its pictures than a request needs.
    """
    if meter.too_costly:
        raise TooLarge(
            None,
            f"The body has more than {TEXT_BYTES} bytes, or {QUOTES // 2} strings, besides its "
            "images, which is more than a request needs.",
        )


def media_type(request: Request) -> str:
    """Return the declared media type of a body, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_media_type(request: Request) -> None:
    """Refuse a body not declared as JSON: any web page can send other types without a preflight."""
    if media_type(request) != "application/json":
        declared = request.headers.get("content-type", "")
        raise UnsupportedMediaType(
            "content-type", f"content-type is {declared[:60]!r}; it must be application/json."
        )


def uploads_of(model: Any) -> frozenset[str]:
    """Return the fields of a body that hold pictures, as dotted paths without indexes of lists.

    Of nested objects, only lists of a single class are searched.
    """
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return frozenset()
    found: set[str] = set()
    for name, field in model.model_fields.items():
        held = field.annotation, *get_args(field.annotation)
        if Upload in held:
            found.add(name)
        elif get_origin(field.annotation) is tuple:
            found |= {f"{name}.{inner}" for inner in uploads_of(held[1])}
    return frozenset(found)


def make_uploads(value: Any, uploads: frozenset[str], share: Share) -> None:
    """Replace the pictures of a body by uploads, in place.

    Args:
        value: body, or a part of it.
        uploads: fields that hold pictures, as :func:`uploads_of` returns them.
        share: share that has reserved their bytes.
    """
    if isinstance(value, list):
        for entry in value:
            make_uploads(entry, uploads, share)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in uploads:
                value[name] = _uploaded(inner, share)
            else:
                make_uploads(inner, below(uploads, name), share)


def _uploaded(value: Any, share: Share) -> Any:
    if isinstance(value, list):
        return [_uploaded(entry, share) for entry in value]
    return share.upload(value) if isinstance(value, str | bytes) else value

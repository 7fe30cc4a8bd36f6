"""Reads the body of a request: bounded in time and memory, and without stopping the loop."""

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
"""Bodies up to this size are read whatever else is going on; each connection may hold one."""

PARSED_AT_ONCE: Final = 2**20
"""Parsing a body of up to this size takes less time than handing it to a thread; with 32 MB of
base64 the parser holds Python's lock for 5 ms."""

RETRY_AFTER_S: Final = 2.0

TIDY_AFTER_S: Final = 2.0
"""Returning memory takes some milliseconds of a thread, so it is not done after every upload."""


class Bodies:
    """The bytes of large bodies that are in memory, over all requests.

    Args:
        most: bytes; a body that would exceed them is refused.
    """

    def __init__(self, most: int) -> None:
        self.held = 0
        self._most = most
        self._tidying: asyncio.TimerHandle | None = None

    def take(self, count: int) -> None:
        """Raises Overloaded if there is no room for so many bytes more."""
        if self.held + count > self._most:
            raise Overloaded(
                RETRY_AFTER_S,
                f"Request bodies of {self.held} bytes are being received; with yours there would "
                f"be more than {self._most}. Try again in {RETRY_AFTER_S:.0f} s.",
            )
        self.held += count

    def give_back(self, count: int) -> None:
        """Count so many bytes less; when all are gone, their memory goes back to the system."""
        self.held -= count
        if count and not self.held and self._tidying is None:
            loop = asyncio.get_running_loop()
            self._tidying = loop.call_later(TIDY_AFTER_S, self._tidy, loop)

    def _tidy(self, loop: asyncio.AbstractEventLoop) -> None:
        self._tidying = None
        if not self.held:
            loop.run_in_executor(None, return_free_memory)


class Share:
    """What one body holds of the bytes; leaving its `with` block gives back the rest."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held = 0

    def grow_to(self, count: int) -> None:
        """Hold so many bytes in all; raises Overloaded if there is no room for them."""
        if count > max(self._held, SMALL_BYTES):
            self._bodies.take(count - self._held)
            self._held = count

    def hold(self, count: int) -> None:
        """Hold so many bytes more, until the answer: of what was made from the body.

        Raises:
            Overloaded: there is no room for them.
        """
        self._bodies.take(count)
        self._held += count

    def give_back(self, count: int) -> None:
        """Hold so many bytes less."""
        count = min(count, self._held)
        self._held -= count
        self._bodies.give_back(count)

    def upload(self, data: str | bytes) -> Upload:
        """A picture of the body, whose bytes are given back when it is decoded."""
        return Upload(data, partial(self.give_back, len(data)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(self._held)


class JsonRoute(APIRoute):
    """A route whose JSON body is read here instead of by FastAPI, which bounds nothing but size.

    Attributes:
        counted: whether a body that is refused counts among the service's outcomes.
    """

    counted: ClassVar[bool] = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, which reads the body and then does as FastAPI's."""
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
        """The parsed body, in which pictures are uploads; None without a body.

        Args:
            request: whose body it is.
            uploads: fields that hold pictures, as :func:`uploads_of` names them.
            share: holds the bytes of the body.

        Raises:
            WeftError: it is no such body, or too large, or too slow.
        """
        _check_media_type(request)
        body = await received(request, share, text=True)
        if not body:
            return None
        try:
            small = len(body) <= PARSED_AT_ONCE
            parsed = from_json(body) if small else await to_thread(from_json, body)
        except ValueError as error:
            raise MalformedBody(None, f"The body is not valid JSON: {error}.") from None
        parsed = self.narrowed(parsed)
        self.take_uploads(parsed, uploads, share)
        return parsed

    def take_uploads(
        self, parsed: Any, uploads: frozenset[str], share: Share, path: tuple[str, ...] = ()
    ) -> None:
        """Check the shape of a parsed body, and make uploads of its pictures.

        Args:
            parsed: the body, or the part of it that has pictures; changed in place.
            uploads: fields that hold them.
            share: holds their bytes.
            path: of the part within the body.

        Raises:
            InvalidRequest: something is larger than in any request.
        """
        check_shape(parsed, uploads, path)
        make_uploads(parsed, uploads, share)

    def narrowed(self, parsed: Any) -> Any:
        """The part of a parsed body that is looked at; all of it, unless a route says otherwise."""
        return parsed

    def _count(self, request: Request, outcome: str) -> None:
        if self.counted:
            service: Service = request.app.state.service
            service.outcomes[outcome] += 1


class _WithBody(Request):
    """A request whose body was read and parsed."""

    def __init__(self, request: Request, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        """Something, if there was a body."""
        return b"" if self._parsed is None else b"{}"

    async def json(self) -> Any:
        return self._parsed


async def received(request: Request, share: Share, *, text: bool) -> bytearray:
    """The bytes of a body.

    Args:
        request: whose body it is.
        share: holds the bytes.
        text: whether it is JSON, of which only so much may be anything but pictures.

    Raises:
        TooLarge: there are too many bytes, or too many beside the pictures.
        RequestTimeout: they do not arrive in time.
        NotReady: the server does not accept requests now.
        Overloaded: there is no room for them, or the queue is full.
    """
    settings: Settings = request.app.state.settings
    most = settings.limits.body_bytes
    announced = request.headers.get("content-length", "0")
    _check_room(request, int(announced), most)
    body, meter = bytearray(), TextMeter()
    try:
        async with asyncio.timeout(settings.body_s):
            async for chunk in request.stream():
                if len(body) <= SMALL_BYTES:
                    _check_room(request, len(body) + len(chunk), most)
                share.grow_to(len(body) + len(chunk))
                body += chunk
                if text:
                    meter.feed(chunk)
                    check_text(meter)
                if len(body) > most:
                    raise TooLarge.body(most)
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive within {settings.body_s:g} s; send it faster or smaller."
        ) from None
    return body


def _check_room(request: Request, size: int, most: int) -> None:
    """Refuse a large body that could not be served, before it is read.

    Raises:
        TooLarge: it is larger than a body may be.
        NotReady: the server does not accept requests now.
        Overloaded: the queue is full.
    """
    if size > most:
        raise TooLarge.body(most)
    if size > SMALL_BYTES:
        service: Service = request.app.state.service
        service.check_room(client_of(request))


def check_text(meter: TextMeter) -> None:
    """Refuse JSON that takes long to parse.

    Raises:
        TooLarge: it has more beside its pictures than a request needs.
    """
    if meter.too_costly:
        raise TooLarge(
            None,
            f"The body has more than {TEXT_BYTES} bytes, or {QUOTES // 2} strings, beside its "
            "images, which is more than a request needs.",
        )


def media_type(request: Request) -> str:
    """The media type that a body is declared as, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_media_type(request: Request) -> None:
    """Refuse a body not declared as JSON, since any web page can send other types unasked."""
    if media_type(request) != "application/json":
        declared = request.headers.get("content-type", "")
        raise UnsupportedMediaType(
            "content-type", f"content-type is {declared[:60]!r}; it must be application/json."
        )


def uploads_of(model: Any) -> frozenset[str]:
    """Fields of a body that hold pictures: dotted paths, in which entries of a list are not named.

    Those of objects are found in lists of one class.
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
    """Make uploads of the pictures of a body, in place.

    Args:
        value: the body, or a part of it.
        uploads: fields that hold pictures, as :func:`uploads_of` names them.
        share: holds their bytes.
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

"""Reading of multipart forms as if they were JSON: files are uploads, texts are values."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fastapi import Request
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from typing_extensions import override

from server.errors import InvalidRequest, MalformedBody
from server.http.body import (
    JsonRoute,
    Share,
    check_text,
    make_uploads,
    media_type,
    received,
)
from server.http.form_names import paths_of
from server.http.text_meter import TextMeter
from server.requests.checks.shape import check_shape

__all__ = ["FormPart", "FormRoute", "fields_of", "parts_of"]

MAX_PARTS: Final = 128
"""Maximum number of parts, more than any request has; each field of an object is a part."""

MAX_UNMEASURED: Final = 8192
"""Bytes up to which a text is parsed as JSON without measuring how much of it is pictures."""

MAX_HEAD_BYTES: Final = 1024
"""Maximum bytes of one part's headers."""

TEXTS: Final = frozenset({"prompt", "negative_prompt", "model", "user", "size"})
"""Fields whose values are texts even if they look like numbers."""


class FormPart(NamedTuple):
    """One part of a form."""

    name: str
    content: bytes
    is_file: bool


class FormRoute(JsonRoute):
    """A route that accepts `multipart/form-data` as well as JSON."""

    @override
    async def read(self, request: Request, uploads: frozenset[str], share: Share) -> Any:
        """Read the body, JSON or form, into the format of :meth:`JsonRoute.read`."""
        if media_type(request) != "multipart/form-data":
            return await super().read(request, uploads, share)
        _, options = parse_options_header(request.headers["content-type"])
        body = bytes(await received(request, share, text=False))
        parsed = await to_thread(_parsed, body, options.get(b"boundary", b""))
        check_shape(parsed, uploads)
        make_uploads(parsed, uploads, share)
        _check_files(parsed)
        # FastAPI checks the media type before it asks for the parsed body.
        request.scope["headers"] = [
            (key, b"application/json" if key == b"content-type" else value)
            for key, value in request.scope["headers"]
        ]
        return parsed


def _parsed(body: bytes, boundary: bytes) -> dict[str, Any]:
    return fields_of(parts_of(body, boundary))


def parts_of(body: bytes, boundary: bytes) -> list[FormPart]:
    """Split a form into its parts.

    The boundary occurs in no part, so the body is simply split at it, and no content makes this
    slow.

    Args:
        body: whole body.
        boundary: boundary from the content-type.

    Raises:
        MalformedBody: the body is not a valid form.
        InvalidRequest: the form has more than `MAX_PARTS` parts.
    """
    if not boundary:
        raise MalformedBody(None, "The form has no boundary in its content-type.")
    _, *found = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)
    if len(found) > MAX_PARTS + 1:
        raise InvalidRequest(None, f"The form has more than {MAX_PARTS} fields.")
    if not found or not found[-1].startswith(b"--"):
        raise MalformedBody(None, "The form ends before its last boundary.")
    return [_part(part) for part in found[:-1]]


def fields_of(parts: Sequence[FormPart]) -> dict[str, Any]:
    """Return the fields of a form, nested by the paths of :func:`server.http.form_names.paths_of`.

    Texts that are JSON numbers, true, false, null, objects or lists become these values.

    Args:
        parts: parts of the form, in its order.

    Raises:
        InvalidRequest: a name is used for two different things, or a text is not UTF-8.
        TooLarge: the JSON in it has more text besides its pictures than a request needs.
    """
    fields: dict[str, Any] = {}
    meter = TextMeter()
    paths = paths_of([part.name for part in parts])
    for (_, content, is_file), path in zip(parts, paths, strict=True):
        _put(fields, path, content if is_file else _value(path, content, meter))
    return {name: _with_lists(value) for name, value in fields.items()}


def _put(fields: dict[str, Any], path: list[str], value: Any) -> None:
    name, *below = path
    if not below:
        # A repeated name is a list, which is how httpx sends lists.
        fields[name] = value if name not in fields else [*_listed(fields[name]), value]
        return
    inner = fields.setdefault(name, {})
    if not isinstance(inner, dict):
        raise InvalidRequest(name, f"{name} is both a value and an object.")
    _put(inner, below, value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(path: list[str], content: bytes, meter: TextMeter) -> Any:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(path[0], f"{path[0]} is not UTF-8 text.") from None
    if path[-1] in TEXTS:
        return text
    if len(content) > MAX_UNMEASURED:
        # A picture in base64 is not JSON.
        if not text.lstrip().startswith(("{", "[")):
            return text
        meter.feed(content)
        check_text(meter)
    try:
        return from_json(text)
    except ValueError:
        return text


def _with_lists(value: Any) -> Any:
    """Return the value with objects whose fields are numbered from 0 turned into lists."""
    if isinstance(value, list):
        return [_with_lists(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(one) for name, one in value.items()}
    places = [str(place) for place in range(len(inner))]
    return [inner[place] for place in places] if set(inner) == set(places) and inner else inner


def _check_files(value: Any, path: tuple[str, ...] = ()) -> None:
    """Refuse files in fields that hold no pictures; files in other fields are uploads by now."""
    if isinstance(value, bytes):
        field = ".".join(path)
        raise InvalidRequest(field, f"{field} is a file; no file is accepted there.")
    entries = enumerate(value) if isinstance(value, list) else ()
    for name, inner in value.items() if isinstance(value, dict) else entries:
        _check_files(inner, (*path, str(name)))


def _part(part: bytes) -> FormPart:
    head_end = part.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    for line in part[: max(head_end, 0)].split(b"\r\n"):
        header, _, value = line.partition(b":")
        if header.strip().lower() == b"content-disposition":
            _, options = parse_options_header(value.strip())
            name = options.get(b"name", b"").decode(errors="replace")
            return FormPart(name, part[head_end + 4 :], b"filename" in options)
    raise MalformedBody(None, "The form has a part without a name.")

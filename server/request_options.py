"""What the options of a command say of a request, as the fields of one."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.errors import InvalidRequest

if TYPE_CHECKING:
    from server.requests.schema import GenerateRequest

__all__ = [
    "adapter_of",
    "base64_of",
    "fields_set",
    "guidance_of",
    "hires_of",
    "named",
    "pictured",
    "request_of",
]

OF_SERVERS: Final = ("response_format", "stream", "priority")
"""Fields about the answer of a server, which a command has none of."""

_NOT_JSON: Final = ValueError, RecursionError
"""What Python raises of a text that is none, has thousands of digits or is nested as deep."""

_SHOWN: Final = 200


def request_of(**given: Any) -> GenerateRequest:
    """The request of these fields; those that are None are left out.

    Raises:
        InvalidRequest: one of them is invalid.
    """
    from pydantic import ValidationError

    from server.requests.messages import explain
    from server.requests.schema import GenerateRequest

    try:
        return GenerateRequest.model_validate(
            {key: value for key, value in given.items() if value is not None}
        )
    except ValidationError as error:
        raise explain(error.errors(), GenerateRequest) from None


def named(text: str | None) -> Any:
    """A bare name as it is, or the object that a JSON text describes.

    Raises:
        InvalidRequest: it begins like an object and is no JSON.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except _NOT_JSON as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise InvalidRequest(None, f"{shown!r} is not valid JSON: {error}.") from None


def guidance_of(
    sampler: str | None, guidance: str | None, scale: float | None, policy: str | None
) -> Any:
    """The guidance that the options describe; what they leave out is as in a request.

    Raises:
        InvalidRequest: one of them is no JSON, or the sampler is unknown.
    """
    extra = {"scale": scale, "policy": named(policy)}
    extra = {key: value for key, value in extra.items() if value is not None}
    if not extra:
        return named(guidance)
    value = _default_guidance(sampler) if guidance is None else named(guidance)
    return (value if isinstance(value, dict) else {"name": value}) | extra


def _default_guidance(sampler: str | None) -> dict[str, Any]:
    """What a request with this sampler gets if it names no guidance."""
    from server.requests.schema import default_guidance, default_sampler

    chosen = request_of(prompt="", sampler=named(sampler)).sampler or default_sampler()
    return default_guidance(chosen).model_dump(mode="json")


def adapter_of(text: str) -> str | dict[str, Any]:
    """An adapter of a request: a bare name, or a name and a weight.

    Raises:
        InvalidRequest: the weight is no number.
    """
    name, separator, weight = text.rpartition("=")
    if not separator:
        return text
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        raise InvalidRequest(
            None, f"--adapter is {text!r}; after the = a number is needed."
        ) from None


def hires_of(text: str | None) -> Any:
    """The second run of a request: by a factor, or as a JSON object describes it.

    Raises:
        InvalidRequest: it is neither.
    """
    if text is None or text.lstrip().startswith("{"):
        return named(text)
    try:
        return {"scale": float(text)}
    except ValueError:
        raise InvalidRequest(
            None, f"--hires is {text!r}; it must be a factor, such as 2, or a JSON object."
        ) from None


def pictured(option: str, text: str) -> dict[str, Any]:
    """A ControlNet or an image prompt of a request, with its picture.

    Args:
        option: that names it.
        text: `NAME=FILE`, `NAME=FILE:SCALE` or a JSON object whose `image` is a file, or a list of
            some, and whose `mask` is a file, if it has one.

    Raises:
        InvalidRequest: it is none of these, or the file cannot be read.
    """
    told = named(text)
    if isinstance(told, dict):
        image = told.get("image")
        several = isinstance(image, list)
        read = [_named_file(option, text, "image", one) for one in (image if several else [image])]
        mask = {"mask": _named_file(option, text, "mask", told["mask"])} if "mask" in told else {}
        return {**told, "image": read if several else read[0], **mask}
    name, separator, file = text.partition("=")
    if not separator:
        raise InvalidRequest(
            None,
            f"{option} is {text!r}; it must be NAME=FILE, NAME=FILE:SCALE or a JSON object.",
        )
    before, _, last = file.rpartition(":")
    scale = None if os.path.isfile(file) or not before else _number(last)
    if scale is None:
        return {"name": name, "image": base64_of(Path(file))}
    return {"name": name, "image": base64_of(Path(before)), "scale": scale}


def _named_file(option: str, text: str, field: str, file: Any) -> str | None:
    """The file in base64 that a field of an object names."""
    if not isinstance(file, str):
        raise InvalidRequest(None, f"{option} is {text!r}; its `{field}` must name a file.")
    return base64_of(Path(file))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def base64_of(path: Path | None) -> str | None:
    """A file in base64; None without one.

    Raises:
        InvalidRequest: it is no file, or cannot be read.
    """
    if path is None:
        return None
    # Unlike pathlib, os.path takes a path that is too long for one at which there is nothing.
    if not os.path.isfile(path):
        raise InvalidRequest(None, f"{str(path)!r} is not a file.")
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(None, f"{str(path)!r} cannot be read: {error.strerror}.") from None


def fields_set(texts: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that options say, and those that are set by name.

    Args:
        texts: each `FIELD=VALUE`; what is no JSON is a text.
        given: by the other options; None where they say nothing.

    Raises:
        InvalidRequest: one is not of that form, is there twice, or is of no use here.
    """
    fields = {key: value for key, value in given.items() if value is not None}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise InvalidRequest(None, f"--set is {text!r}; it must be FIELD=VALUE.")
        if name in fields:
            raise InvalidRequest(name, f"--set gives {name}, which was given before; give it once.")
        if name in OF_SERVERS:
            raise InvalidRequest(name, f"--set gives {name}, which only a server does.")
        try:
            fields[name] = json.loads(value)
        except _NOT_JSON:
            fields[name] = value
    return fields

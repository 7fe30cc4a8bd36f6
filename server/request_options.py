"""Conversion of a command's options to the fields of a request."""

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
"""Fields that concern a server's response, which have no meaning for a command."""

_NOT_JSON: Final = ValueError, RecursionError
"""Errors of Python for text that is not JSON, has huge numbers, or is nested too deeply."""

_SHOWN: Final = 200


def request_of(**given: Any) -> GenerateRequest:
    """Make a request of these fields; those that are None are left out.

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
    """Return a bare name unchanged, or the object that a JSON text describes.

    Raises:
        InvalidRequest: it begins like an object but is not JSON.
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
    """Make the guidance that the options describe; what they leave out is as in a request.

    Raises:
        InvalidRequest: an option is not JSON, or the sampler is unknown.
    """
    extra = {"scale": scale, "policy": named(policy)}
    extra = {key: value for key, value in extra.items() if value is not None}
    if not extra:
        return named(guidance)
    value = _default_guidance(sampler) if guidance is None else named(guidance)
    return (value if isinstance(value, dict) else {"name": value}) | extra


def _default_guidance(sampler: str | None) -> dict[str, Any]:
    """The guidance of a request with this sampler that names none."""
    from server.requests.schema import default_guidance, default_sampler

    chosen = request_of(prompt="", sampler=named(sampler)).sampler or default_sampler()
    return default_guidance(chosen).model_dump(mode="json")


def adapter_of(text: str) -> str | dict[str, Any]:
    """Parse an adapter of a request: a bare name, or a name and a weight.

    Raises:
        InvalidRequest: the weight is not a number.
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
    """Parse the second run of a request: a factor, or a JSON object.

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
    """Parse a ControlNet or an image prompt of a request, with its picture.

    Args:
        option: name of the option, for the error message.
        text: `NAME=FILE`, `NAME=FILE:SCALE` or a JSON object, whose `image` is a file or a list of
            files, and whose `mask` is a file, if it has one.

    Raises:
        InvalidRequest: it is none of these, or the file cannot be read.
    """
    described = named(text)
    if isinstance(described, dict):
        image = described.get("image")
        several = isinstance(image, list)
        read = [_named_file(option, text, "image", one) for one in (image if several else [image])]
        mask = (
            {"mask": _named_file(option, text, "mask", described["mask"])}
            if "mask" in described
            else {}
        )
        return {**described, "image": read if several else read[0], **mask}
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
    """Read the file that a field of an object names, in base64."""
    if not isinstance(file, str):
        raise InvalidRequest(None, f"{option} is {text!r}; its `{field}` must name a file.")
    return base64_of(Path(file))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def base64_of(path: Path | None) -> str | None:
    """Read a file in base64; None without one.

    Raises:
        InvalidRequest: it is not a file, or cannot be read.
    """
    if path is None:
        return None
    # Unlike pathlib, os.path treats a path that is too long as one that does not exist.
    if not os.path.isfile(path):
        raise InvalidRequest(None, f"{str(path)!r} is not a file.")
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(None, f"{str(path)!r} cannot be read: {error.strerror}.") from None


def fields_set(texts: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Merge the fields of a request that options give and those that are set by name.

    Args:
        texts: texts of the form `FIELD=VALUE`; a value that is not JSON is a string.
        given: fields from the other options; None where an option is not given.

    Raises:
        InvalidRequest: a text has another form, sets a field twice, or sets one that has no use
            here.
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

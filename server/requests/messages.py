"""Turns pydantic's validation errors into one sentence for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from guidance.parts import PARTS
from server.errors import InvalidRequest, MalformedBody
from server.requests.adapters import WeightedName
from server.requests.choice import listed
from server.requests.controls import ControlChoice
from server.requests.image_prompts import ImagePromptChoice
from server.requests.reading import LIKE, SAME
from server.requests.schema import CHOICES
from server.requests.upload import Upload

__all__ = ["explain"]

_SHOWN = 60

_OF_ONE_KIND: Mapping[str, type[BaseModel]] = {
    "adapters": WeightedName,
    "controls": ControlChoice,
    "image_prompts": ImagePromptChoice,
    **{
        field: kind
        for field, kinds in CHOICES.items()
        for kind in kinds.values()
        if len(kinds) == 1
    },
    **{part.field: part.kinds[0] for part in PARTS if len(part.kinds) == 1},
}
"""Fields that hold objects with no tag in their path."""

_NEEDS: Mapping[str, str] = {
    "missing": "is required",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 19 digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "list_type": "must be a list",
    "too_long": "must have at most {max_length}",
    "too_short": "must have at least {min_length}",
    "tuple_type": "must be a list",
}


def explain(
    errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None, *, within: int = 0
) -> InvalidRequest:
    """The first error, as one sentence that names the field by its dotted path.

    Args:
        errors: pydantic's, at least one.
        model: the model that was validated, for the names of its fields.
        within: leading parts of a location that are not fields, such as FastAPI's `body`.
    """
    error = errors[0]
    if error["type"] == "json_invalid":
        reason = error["ctx"]["error"]
        return MalformedBody(None, f"The body is not valid JSON: {reason} at {error['loc'][-1]}.")
    loc = error["loc"][within:]
    path = _path(loc)
    if not path and error["type"] == "sentence":
        return InvalidRequest(error["ctx"]["field"], str(error["msg"]))
    if not path and error["type"] == "string_unicode":
        return InvalidRequest(None, "The body has a field whose name is not valid Unicode.")
    if not path:
        return InvalidRequest(None, "The body must be a JSON object.")
    param = ".".join(path)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(param, _unknown(param, _siblings(model, loc)))
    return InvalidRequest(param, _sentence(param, error))


def _sentence(param: str, error: Mapping[str, Any]) -> str:
    if error["type"] == "sentence":
        return str(error["msg"])
    context = {key: _plain(value) for key, value in error.get("ctx", {}).items()}
    needs = _NEEDS.get(error["type"])
    if error["type"] == "missing":
        return f"{param} {needs}."
    if error["type"] == "value_error":
        return f"{param}: {str(error['msg']).removeprefix('Value error, ').rstrip('.')}."
    if needs is None:
        return f"{param} {_lowered(str(error['msg']))}."
    if error["type"] in ("too_long", "too_short"):
        return f"{param} has {len(error['input'])} entries; it {needs.format(**context)}."
    return f"{param} is {_shown(error['input'])}; it {needs.format(**context)}."


def _unknown(param: str, allowed: Sequence[str]) -> str:
    if not allowed:
        return f"{_clean(param)} is not a known field; remove it."
    name = param.rpartition(".")[2][:_SHOWN]
    like = {**LIKE, **SAME}.get(name)
    near = [like] if like in allowed else get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{_clean(param)} is not a known field{hint}; allowed are: {listed(allowed)}."


def _path(loc: Sequence[Any]) -> list[str]:
    """The field's path without `body` and without the tags of tagged unions."""
    path: list[str] = []
    field = ""
    for part in loc:
        if str(part) in CHOICES.get(field, {}):
            continue
        path.append(str(part))
        field = field if isinstance(part, int) else str(part)
    return path


def _siblings(model: type[BaseModel] | None, loc: Sequence[Any]) -> list[str]:
    """The fields of the object that contains an unknown field."""
    field = ""
    for part in loc[:-1]:
        model = _OF_ONE_KIND.get(str(part)) or _inside(model, str(part)) or model
        model = CHOICES.get(field, {}).get(str(part), model)
        field = field if isinstance(part, int) else str(part)
    known = list(model.model_fields) if model is not None else []
    is_rule = model in CHOICES["guidance"].values()
    return [*known, *(part.field for part in PARTS)] if is_rule else known


def _inside(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """The class of the objects that a field takes, where it takes those of one class only."""
    info = None if model is None else model.model_fields.get(field)
    kinds = () if info is None else get_args(info.annotation) or (info.annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if len(found) == 1 else None


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value).replace(" or ", ", ")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Upload):
        return "a picture"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "too long"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _clean(text: str) -> str:
    """The text, shortened and without characters that cannot be encoded."""
    return text[:_SHOWN].encode(errors="replace").decode()

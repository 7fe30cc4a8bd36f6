"""Translation of pydantic's validation errors into one sentence for the user."""

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
from server.wording import SHOWN, demand_of, shown

__all__ = ["explain"]

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
"""Fields that hold objects without a tag in their path."""


def explain(
    errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None, *, within: int = 0
) -> InvalidRequest:
    """Return the first error as one sentence that names the field by its dotted path.

    Args:
        errors: pydantic's errors, at least one.
        model: model that was validated, for the names of its fields.
        within: number of leading parts of a location that are not fields, such as FastAPI's `body`.
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
    needs = demand_of(error)
    if error["type"] == "missing":
        return f"{param} {needs}."
    if error["type"] == "value_error":
        return f"{param}: {str(error['msg']).removeprefix('Value error, ').rstrip('.')}."
    if needs is None:
        return f"{param} {_lowered(str(error['msg']))}."
    if error["type"] in ("too_long", "too_short"):
        return f"{param} has {len(error['input'])} entries; it {needs}."
    return f"{param} is {_shown(error['input'])}; it {needs}."


def _unknown(param: str, allowed: Sequence[str]) -> str:
    if not allowed:
        return f"{_clean(param)} is not a known field; remove it."
    name = param.rpartition(".")[2][:SHOWN]
    like = {**LIKE, **SAME}.get(name)
    near = [like] if like in allowed else get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{_clean(param)} is not a known field{hint}; allowed are: {listed(allowed)}."


def _path(loc: Sequence[Any]) -> list[str]:
    """Return the field's path without the tags of tagged unions."""
    path: list[str] = []
    field = ""
    for part in loc:
        if str(part) in CHOICES.get(field, {}):
            continue
        path.append(str(part))
        field = field if isinstance(part, int) else str(part)
    return path


def _siblings(model: type[BaseModel] | None, loc: Sequence[Any]) -> list[str]:
    """Return the fields of the object that contains an unknown field."""
    field = ""
    for part in loc[:-1]:
        model = _OF_ONE_KIND.get(str(part)) or _inside(model, str(part)) or model
        model = CHOICES.get(field, {}).get(str(part), model)
        field = field if isinstance(part, int) else str(part)
    known = list(model.model_fields) if model is not None else []
    is_rule = model in CHOICES["guidance"].values()
    return [*known, *(part.field for part in PARTS)] if is_rule else known


def _inside(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """Return the class of the objects that a field takes, if it takes only one class."""
    info = None if model is None else model.model_fields.get(field)
    kinds = () if info is None else get_args(info.annotation) or (info.annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if len(found) == 1 else None


def _shown(value: Any) -> str:
    return "a picture" if isinstance(value, Upload) else shown(value)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _clean(text: str) -> str:
    """Return the text, shortened and without characters that cannot be encoded."""
    return text[:SHOWN].encode(errors="replace").decode()

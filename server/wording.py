"""Sentences about what pydantic requires of a value, and what the value is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SHOWN", "demand_of", "shown"]

SHOWN: Final = 60
"""Maximum number of characters of a value, or of a name, that are shown."""

_DEMANDS: Mapping[str, str] = {
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


def demand_of(error: Mapping[str, Any]) -> str | None:
    """The requirement on a value as a clause, "must be at least 1"; None if pydantic's text serves.

    Args:
        error: an error of pydantic.
    """
    demand = _DEMANDS.get(error["type"])
    if demand is None:
        return None
    return demand.format(**{key: _plain(value) for key, value in error.get("ctx", {}).items()})


def shown(value: Any) -> str:
    """A shortened representation of a value that is not allowed."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[: SHOWN + 1]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**SHOWN else "too long"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value).replace(" or ", ", ")

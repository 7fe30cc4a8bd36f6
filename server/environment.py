"""Sentences about errors in the settings that an operator wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Final

from pydantic import BaseModel, ValidationError

from server.requests.messages import explain
from server.settings import Settings
from weft_plugins import VARIABLE

__all__ = ["groups_without_json", "refusal", "unknown_variables"]

PREFIX: Final = str(Settings.model_config.get("env_prefix"))

CLIENTS_KEY: Final = "WEFT_API_KEY"
"""Not a setting: clients such as `examples/stream.py` read their key from it."""


def refusal(error: ValidationError) -> str:
    """Describe the first error in settings: the field, its value and what is allowed."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    return explain([first], Settings).message


def groups_without_json(environ: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each variable of a group of settings, such as WEFT_LIMITS, without JSON."""
    texts = {name.upper(): text for name, text in environ.items()}
    for name, field in Settings.model_fields.items():
        variable = f"{PREFIX}{name.upper()}"
        if not isinstance(field.default, BaseModel) or variable not in texts:
            continue
        try:
            json.loads(texts[variable])
        except (ValueError, RecursionError):
            one = next(iter(type(field.default).model_fields)).upper()
            yield (
                f"{variable} is not valid JSON; it must be an object of settings, which can also "
                f"be given one by one, as {variable}__{one}."
            )


def unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each variable that looks like a setting but is not one.

    Unknown members of a group, such as WEFT_LIMITS__PIXLES, are refused when settings are read.
    """
    # Plug-ins are registered before settings can be read.
    known = [*(f"{PREFIX}{name.upper()}" for name in Settings.model_fields), VARIABLE]
    for variable in sorted(environ):
        name = variable.upper()
        if not name.startswith(PREFIX) or name == CLIENTS_KEY:
            continue
        if name.partition("__")[0] not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.85)
            meant = f"; did you mean {near[0]}?" if near else "."
            yield f"{variable} is set, but there is no such setting{meant}"

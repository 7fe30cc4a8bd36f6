"""Reads settings from the text that AUTOMATIC1111, and this server, write into images."""

from __future__ import annotations

import json
import re
from typing import Final

__all__ = ["read_infotext"]

_FIELD: Final = re.compile(r'(?<![\w \-/])([\w \-/]++):\s*+("(?:\\.|[^\\"])++"|[^,]*+)(?:,|$)')
"""As AUTOMATIC1111 parses the last line (modules/infotext_utils.py), in a time that is proportional
to its length: a name is looked for only where one can begin, and never again from its middle."""

_FEWEST: Final = 3
"""Fields of a last line; with fewer it is a part of the prompt, as there."""

_NEGATIVE: Final = "Negative prompt:"
_SIZE: Final = re.compile(r"(\d+)x(\d+)")


def read_infotext(text: str) -> dict[str, str]:
    """The fields by their names there: `Prompt`, `Negative prompt`, `Steps`, `Size-1`, ...

    Args:
        text: lines of the prompt, lines of the negative prompt, and one line of fields.
    """
    *lines, last = text.strip().split("\n")
    fields = _FIELD.findall(last)
    if len(fields) < _FEWEST:
        lines, fields = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    told = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            told = negative
            line = line.removeprefix(_NEGATIVE).strip()
        told.append(line)
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for spaced, value in fields:
        name, plain = spaced.strip(), _unquoted(value)
        if size := _SIZE.fullmatch(plain):
            found[f"{name}-1"], found[f"{name}-2"] = size[1], size[2]
        else:
            found[name] = plain
    return found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value

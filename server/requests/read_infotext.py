"""Parsing of the infotext that AUTOMATIC1111 and this server write into images."""

from __future__ import annotations

import json
import re
from typing import Final

__all__ = ["read_infotext"]

_FIELD: Final = re.compile(r'(?<![\w \-/])([\w \-/]++):\s*+("(?:\\.|[^\\"])++"|[^,]*+)(?:,|$)')
"""Pattern for the last line, equivalent to AUTOMATIC1111's (modules/infotext_utils.py), but in
linear time: a name is searched for only where one can begin, without backtracking into it."""

_MIN_FIELDS: Final = 3
"""Minimum number of fields in the last line; with fewer it belongs to the prompt, as in
AUTOMATIC1111."""

_NEGATIVE: Final = "Negative prompt:"
_SIZE: Final = re.compile(r"(\d+)x(\d+)")


def read_infotext(text: str) -> dict[str, str]:
    """Return fields by AUTOMATIC1111's names: `Prompt`, `Negative prompt`, `Steps`, `Size-1`, ...

    Args:
        text: lines of the prompt, lines of the negative prompt, and one line of fields.
    """
    *lines, last = text.strip().split("\n")
    fields = _FIELD.findall(last)
    if len(fields) < _MIN_FIELDS:
        lines, fields = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    section = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            section = negative
            line = line.removeprefix(_NEGATIVE).strip()
        section.append(line)
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

"""Names of form fields, converted to paths in the equivalent JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from server.errors import InvalidRequest

__all__ = ["paths_of"]

MAX_DEPTH: Final = 8

_NAME: Final = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_SUBSCRIPT: Final = re.compile(r"\[([^\[\]]*)\]")
_NEXT: Final = ""
"""Content of the brackets in `a[]`."""


def paths_of(names: Sequence[str]) -> list[list[str]]:
    """Return the path of each field, in which entries of lists are numbered from 0.

    `a[b]` is a field of an object, and `a[]` the next entry of a list. OpenAI's clients write a
    list of objects as `a[][b]` and send all fields of one name together, so the first `a[][b]` and
    the first `a[][c]` belong to the same entry. Entries that are objects come after those that are
    not.

    Args:
        names: names of all fields, in the form's order.

    Raises:
        InvalidRequest: a name has too many levels, or it is ambiguous to which entry it belongs.
    """
    paths = [_path(name) for name in names]
    times = Counter(map(tuple, paths))
    seen: Counter[tuple[str, ...]] = Counter()
    for name, path in zip(names, paths, strict=True):
        if _NEXT not in path:
            continue
        whole, place = tuple(path), path.index(_NEXT)
        start = whole[: place + 1]
        if _NEXT in path[place + 1 :]:
            raise InvalidRequest(
                path[0],
                f"{name[:60]} is a list within a list; send {path[0]} as JSON in one field.",
            )
        alike = {times[other] for other in times if len(other) > len(start) and _in(other, start)}
        if len(alike) > 1:
            raise InvalidRequest(
                path[0],
                f"{path[0]} has entries with different fields, so that {name[:60]} may belong to "
                f"any of them; number them, as in {_numbered(path, place)}, or send {path[0]} as "
                "JSON in one field.",
            )
        path[place] = str(seen[whole] + (times[start] if whole != start else 0))
        seen[whole] += 1
    return paths


def _path(name: str) -> list[str]:
    match = _NAME.fullmatch(name)
    path = [name] if match is None else [match[1], *_SUBSCRIPT.findall(match[2])]
    if len(path) > MAX_DEPTH:
        raise InvalidRequest(None, f"A field is nested deeper than {MAX_DEPTH} levels.")
    return path


def _in(path: tuple[str, ...], start: tuple[str, ...]) -> bool:
    return path[: len(start)] == start


def _numbered(path: list[str], place: int) -> str:
    """Return the name of a field with an explicit number, as for the first entry."""
    first, *below = [*path[:place], "0", *path[place + 1 :]]
    return first + "".join(f"[{one}]" for one in below)

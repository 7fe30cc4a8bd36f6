"""Checks that JSON is not larger than a request needs, before it is validated."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from server.errors import InvalidRequest
from server.settings import PROMPT_BYTES_CEILING

__all__ = ["below", "check_shape"]

MAX_FIELDS: Final = 64
MAX_ENTRIES: Final = 2048
MAX_CHARACTERS: Final = PROMPT_BYTES_CEILING
MAX_NAME_LENGTH: Final = 64


def check_shape(value: Any, uploads: Collection[str], path: tuple[str, ...] = ()) -> None:
    """Refuse objects, lists, names and texts that are larger than any request needs.

    What passes can be validated, with its errors explained, in a few milliseconds.

    Args:
        value: parsed JSON.
        uploads: dotted paths of the fields that may hold long texts; entries of a list have the
            path of the list.
        path: path of the value within the body.

    Raises:
        InvalidRequest: something is too large; the first is named.
    """
    if isinstance(value, str):
        _at_most(path, len(value), MAX_CHARACTERS, "characters")
    elif isinstance(value, list):
        _at_most(path, len(value), MAX_ENTRIES, "entries")
        for index, entry in enumerate(value):
            check_shape(entry, uploads, (*path, str(index)))
    elif isinstance(value, dict):
        _at_most(path, len(value), MAX_FIELDS, "fields")
        for name, inner in value.items():
            if len(name) > MAX_NAME_LENGTH:
                raise InvalidRequest(
                    None,
                    f"{_named(path)} has a field whose name has {len(name)} characters; at most "
                    f"{MAX_NAME_LENGTH} are allowed.",
                )
            if name not in uploads or not _is_text(inner):
                check_shape(inner, below(uploads, name), (*path, name))


def _is_text(value: Any) -> bool:
    """Return whether a value is a text or a list of texts."""
    if isinstance(value, list):
        return len(value) <= MAX_ENTRIES and all(isinstance(one, str) for one in value)
    return isinstance(value, str)


def below(paths: Collection[str], name: str) -> frozenset[str]:
    """Return the rest of the dotted paths that begin with a field."""
    start = f"{name}."
    return frozenset(path.removeprefix(start) for path in paths if path.startswith(start))


def _at_most(path: tuple[str, ...], count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidRequest(
            ".".join(path) or None,
            f"{_named(path)} has {count} {what}; at most {limit} are allowed.",
        )


def _named(path: tuple[str, ...]) -> str:
    return ".".join(path).encode(errors="replace").decode() or "The body"

"""Finds embedding names in a text as whole words, ignoring case and the amount of whitespace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["divided", "named"]


def named(text: str, names: Collection[str]) -> tuple[str, ...]:
    """The names that occur in a text as words, in the order of ``names``.

    Args:
        text: a prompt.
        names: names of embeddings.
    """
    found = {name for _, name in divided(text, names) if name is not None}
    return tuple(name for name in names if name in found)


def divided(text: str, names: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Split a text at embedding names; yields each part with its name, or None for other text.

    Of several names that begin at the same place, the longest is used, as in AUTOMATIC1111.

    Args:
        text: a prompt.
        names: names of embeddings, each one or several words.
    """
    # Most names do not occur in the text, and this test is a hundred times as fast as a pattern.
    plain = _plain(text)
    likely = sorted((name for name in names if _plain(name) in plain), key=len, reverse=True)
    if not likely:
        yield text, None
        return
    words = [r"\s+".join(map(re.escape, name.split())) for name in likely]
    one_of_them = "|".join(f"({word})" for word in words)
    pattern = re.compile(rf"(?<!\w)(?:{one_of_them})(?!\w)", re.IGNORECASE)
    done = 0
    for match in pattern.finditer(text):
        if before := text[done : match.start()]:
            yield before, None
        yield match[0], likely[(match.lastindex or 1) - 1]
        done = match.end()
    if after := text[done:]:
        yield after, None


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()

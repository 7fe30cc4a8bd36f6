"""A study's page: a template of prose, filled with Markdown tables."""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

NO_VALUE = "–"
"""Content of a table's cell for which nothing was measured."""


def fill(template: Path, entries: Mapping[str, str], path: Path) -> None:
    """Write a page.

    Args:
        template: file of prose with a ``$name`` for each entry.
        entries: text by name.
        path: path of the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Template(template.read_text()).substitute(entries))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

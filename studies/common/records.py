"""Results stored as JSON lines, so that nothing is measured twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DIGITS = 5


class Records:
    """A file with one result per line, each with the key of its cell.

    Args:
        path: the file; created with the first result.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[str, dict[str, Any]] = {}
        for line in lines:
            record: dict[str, Any] = json.loads(line)
            self._found[key_of(record["of"])] = record

    def __contains__(self, of: Mapping[str, Any]) -> bool:
        return key_of(of) in self._found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._found.values())

    def add(self, of: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Append one result to the file at once."""
        record: dict[str, Any] = {"of": dict(of), **{k: _rounded(v) for k, v in result.items()}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._found[key_of(of)] = record


def key_of(of: Mapping[str, Any]) -> str:
    """A text that is the same for equal descriptions, whatever the order of their entries."""
    return json.dumps(of, sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value

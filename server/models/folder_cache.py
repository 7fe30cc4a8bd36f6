"""What was found in folders, kept for as long as nothing is added to them or removed."""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from server.models.folder import stamp_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["FolderCache"]

SETTLED_NS: Final = 2 * 10**9
"""Age of a folder's last change from which on another one has another time in all file systems."""

Found = TypeVar("Found")


class FolderCache(Generic[Found]):
    """Lists folders of thousands of entries again only once they have changed.

    Args:
        read: what is kept of a folder, by its entries' names alone.
    """

    def __init__(self, read: Callable[[Path], Found]) -> None:
        self._read = read
        self._kept: dict[Path, tuple[tuple[int, int], Found]] = {}

    def of(self, folder: Path) -> Found:
        """What is in a folder now."""
        stamp = stamp_of(folder)
        if folder in self._kept and self._kept[folder][0] == stamp:
            return self._kept[folder][1]
        found = self._read(folder)
        if time_ns() - stamp[0] > SETTLED_NS:
            self._kept[folder] = stamp, found
        return found

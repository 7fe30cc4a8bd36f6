"""Caches the contents of folders for as long as no entries are added or removed."""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from server.models.folder import stamp_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["FolderCache"]

STABLE_AGE_NS: Final = 2 * 10**9
"""Age of a folder's last change above which a later change has a different time stamp on all file
systems."""

Found = TypeVar("Found")


class FolderCache(Generic[Found]):
    """Lists folders of thousands of entries again only after they have changed.

    Args:
        read: computes the value to cache from a folder, using only its entries' names.
    """

    def __init__(self, read: Callable[[Path], Found]) -> None:
        self._read = read
        self._kept: dict[Path, tuple[tuple[int, int], Found]] = {}

    def of(self, folder: Path) -> Found:
        """The cached value of a folder, up to date."""
        stamp = stamp_of(folder)
        if folder in self._kept and self._kept[folder][0] == stamp:
            return self._kept[folder][1]
        found = self._read(folder)
        if time_ns() - stamp[0] > STABLE_AGE_NS:
            self._kept[folder] = stamp, found
        return found

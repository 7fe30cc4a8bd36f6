"""The order of decoding: frames of live streams first, with regular turns for uploads."""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

__all__ = ["DecodingTurns"]

T = TypeVar("T")

FRAMES_IN_A_ROW: Final = 3
"""Number of frames after which a waiting upload is decoded; streams alone could fill the time."""


class DecodingTurns(Generic[T]):
    """Queues of what waits to be decoded."""

    def __init__(self) -> None:
        self._frames: deque[T] = deque()
        self._uploads: deque[T] = deque()
        self._in_a_row = 0

    def add(self, one: T, *, frame: bool) -> None:
        """Add an item at the end of its queue."""
        (self._frames if frame else self._uploads).append(one)

    def next(self) -> T | None:
        """Take the item whose turn it is; None if nothing waits."""
        if self._frames and not (self._uploads and self._in_a_row == FRAMES_IN_A_ROW):
            self._in_a_row = self._in_a_row + 1 if self._uploads else 0
            return self._frames.popleft()
        self._in_a_row = 0
        return self._uploads.popleft() if self._uploads else None

    def withdraw(self, one: T) -> None:
        """Remove an item, if it still waits."""
        for waiting in (self._frames, self._uploads):
            if one in waiting:
                waiting.remove(one)

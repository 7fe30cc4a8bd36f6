"""The order in which pictures are decoded: frames of live streams first, uploads in their turn."""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

__all__ = ["DecodingTurns"]

T = TypeVar("T")

FRAMES_IN_A_ROW: Final = 3
"""After so many frames an upload is decoded, if one waits: streams alone could fill the time."""


class DecodingTurns(Generic[T]):
    """What waits to be decoded."""

    def __init__(self) -> None:
        self._frames: deque[T] = deque()
        self._uploads: deque[T] = deque()
        self._in_a_row = 0

    def add(self, one: T, *, frame: bool) -> None:
        """Let one wait, behind those of its kind."""
        (self._frames if frame else self._uploads).append(one)

    def next(self) -> T | None:
        """Whose turn it is; None if nothing waits."""
        if self._frames and not (self._uploads and self._in_a_row == FRAMES_IN_A_ROW):
            self._in_a_row = self._in_a_row + 1 if self._uploads else 0
            return self._frames.popleft()
        self._in_a_row = 0
        return self._uploads.popleft() if self._uploads else None

    def withdraw(self, one: T) -> None:
        """Forget one, if it waits still."""
        for waiting in (self._frames, self._uploads):
            if one in waiting:
                waiting.remove(one)

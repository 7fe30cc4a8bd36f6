"""Images that were submitted and not taken in yet."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from server.engine.state.sequence import Sequence


class Arrivals:
    """In order of arrival, but frames of live streams before all others."""

    def __init__(self) -> None:
        self._live: deque[Sequence] = deque()
        self._ordinary: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._live) + len(self._ordinary)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._live, self._ordinary)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Take in images."""
        for sequence in sequences:
            (self._live if sequence.live else self._ordinary).append(sequence)

    def take(self, live: int, ordinary: int) -> list[Sequence]:
        """The next images, so many of each kind; more only where a group would be divided."""
        return [*_taken(self._live, live), *_taken(self._ordinary, ordinary)]

    def take_all(self) -> list[Sequence]:
        """All images."""
        return self.take(len(self), len(self))


def _taken(queue: deque[Sequence], most: int) -> list[Sequence]:
    taken: list[Sequence] = []
    while queue and (len(taken) < most or taken[-1].together_with(queue[0])):
        taken.append(queue.popleft())
    return taken

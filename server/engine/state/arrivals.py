"""Images that were submitted and not taken in yet."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from server.engine.client import Flow
    from server.engine.state.sequence import Sequence


class Arrivals:
    """Frames of live streams before all others; these by turns of their flows.

    The images of a flow, and live frames, stay in order of arrival.
    """

    def __init__(self) -> None:
        self._live: deque[Sequence] = deque()
        self._ordinary: dict[Flow, deque[Sequence]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in (self._live, *self._ordinary.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._live, *self._ordinary.values())

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Take in images."""
        for sequence in sequences:
            if sequence.live:
                self._live.append(sequence)
            else:
                self._ordinary.setdefault(sequence.flow, deque()).append(sequence)

    def take(
        self, live: int, ordinary: int, may_come: Callable[[Sequence], bool] = lambda _: True
    ) -> list[Sequence]:
        """The next images, so many of each kind; more only where a group would be divided.

        Args:
            live: most frames of live streams.
            ordinary: most other images, one of each flow in turn.
            may_come: whether an ordinary image may be taken now; asked once of each, and if not,
                the later ones of its flow wait with it.
        """
        taken = [self._live.popleft() for _ in range(min(live, len(self._live)))]
        return [*taken, *self._in_turns(ordinary, may_come)]

    def take_all(self) -> list[Sequence]:
        """All images."""
        return self.take(len(self), len(self))

    def _in_turns(self, most: int, may_come: Callable[[Sequence], bool]) -> list[Sequence]:
        taken: list[Sequence] = []
        flows = deque(self._ordinary)
        while flows and len(taken) < most:
            flow = flows.popleft()
            queue = self._ordinary[flow]
            if not may_come(queue[0]):
                continue
            taken += _unit(queue)
            # Behind those that have not had a turn, also the next time.
            del self._ordinary[flow]
            if queue:
                self._ordinary[flow] = queue
                flows.append(flow)
        return taken


def _unit(queue: deque[Sequence]) -> list[Sequence]:
    """The next image, or all of its group."""
    taken = [queue.popleft()]
    while queue and taken[-1].together_with(queue[0]):
        taken.append(queue.popleft())
    return taken

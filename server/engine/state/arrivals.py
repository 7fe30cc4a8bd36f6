"""Queue of images that were submitted and are not admitted yet."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from server.engine.client import Flow
    from server.engine.state.sequence import Sequence


class Arrivals:
    """Queued images: frames of live streams first, then others by turns of their flows.

    Live frames, and the images of each flow, stay in order of arrival.
    """

    def __init__(self) -> None:
        self._live: deque[Sequence] = deque()
        self._ordinary: dict[Flow, deque[Sequence]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in (self._live, *self._ordinary.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._live, *self._ordinary.values())

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add images."""
        for sequence in sequences:
            if sequence.live:
                self._live.append(sequence)
            else:
                self._ordinary.setdefault(sequence.flow, deque()).append(sequence)

    def take(
        self, live: int, ordinary: int, may_come: Callable[[Sequence], bool] = lambda _: True
    ) -> list[Sequence]:
        """Take the next images; exceed the numbers only so as not to divide a group.

        Args:
            live: maximum number of frames of live streams.
            ordinary: maximum number of other images, one of each flow in turn.
            may_come: function that returns whether an ordinary image may be taken now. It is called
                once for an image; if it returns False, the later ones of the flow wait with it.
        """
        taken = [self._live.popleft() for _ in range(min(live, len(self._live)))]
        return [*taken, *self._in_turns(ordinary, may_come)]

    def take_all(self) -> list[Sequence]:
        """Take all images."""
        return self.take(len(self), len(self))

    def _in_turns(self, max_images: int, may_come: Callable[[Sequence], bool]) -> list[Sequence]:
        taken: list[Sequence] = []
        flows = deque(self._ordinary)
        while flows and len(taken) < max_images:
            flow = flows.popleft()
            queue = self._ordinary[flow]
            if not may_come(queue[0]):
                continue
            taken += _unit(queue)
            # The flow goes behind those that have not had a turn, also for the next call.
            del self._ordinary[flow]
            if queue:
                self._ordinary[flow] = queue
                flows.append(flow)
        return taken


def _unit(queue: deque[Sequence]) -> list[Sequence]:
    """Take the next image, or all of its group."""
    taken = [queue.popleft()]
    while queue and taken[-1].together_with(queue[0]):
        taken.append(queue.popleft())
    return taken

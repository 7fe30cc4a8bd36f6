"""Finished images that wait for the decoder, and whose turn it is."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.engine.client import Flow
    from server.engine.fair_queue import Turns
    from server.engine.state.sequence import Sequence

LIVE_TURNS = 3
"""Turns in a row of live frames after which ordinary images that wait have one.

So ordinary images have at least a quarter of the turns, as they are promised a quarter of the
device's time (``server/engine/live_share.py``).
"""


class DecoderQueue:
    """Frames of live streams, and ordinary images by their flows.

    Each flow, and all live frames, keep the order in which they finished.

    Args:
        turns: what the clients of ordinary images have had of the device.

    Attributes:
        live: frames of live streams.
    """

    def __init__(self, turns: Turns) -> None:
        self.live: deque[Sequence] = deque()
        self._ordinary: dict[Flow, deque[Sequence]] = {}
        self._turns = turns
        self._live_turns = 0

    def __len__(self) -> int:
        return len(self.live) + self.ordinary

    @property
    def ordinary(self) -> int:
        """How many ordinary images wait."""
        return sum(map(len, self._ordinary.values()))

    def add(self, sequence: Sequence) -> None:
        """Take in an image that finished."""
        if sequence.live:
            self.live.append(sequence)
        else:
            self._ordinary.setdefault(sequence.flow, deque()).append(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """Forget an image; False if it does not wait here."""
        queue = self.live if sequence.live else self._ordinary.get(sequence.flow, deque())
        waits = sequence in queue
        if waits:
            queue.remove(sequence)
            self._forget_empty()
        return waits

    def take_live(self, most: int) -> list[Sequence]:
        """The next frames of live streams, all of one lane."""
        return _of_one_lane(self.live, most)

    def take_ordinary(self, most: Callable[[Sequence], int]) -> list[Sequence]:
        """The next ordinary images of the flow whose turn it is, all of one lane; none if none is.

        Args:
            most: how many may be taken of a flow, given the first of its images; 0 where it has to
                wait for others.
        """
        for flow in sorted(self._ordinary, key=self._turns.standing):
            queue = self._ordinary[flow]
            if count := most(queue[0]):
                taken = _of_one_lane(queue, count)
                self._forget_empty()
                return taken
        return []

    def live_turn(self) -> bool:
        """Whether the next call of the decoder is to be for live frames, where it serves both.

        Live frames go first. While ordinary images wait, every turn after ``LIVE_TURNS`` of live
        frames is theirs.
        """
        if not self._ordinary:
            self._live_turns = 0
            return True
        if self.live and self._live_turns < LIVE_TURNS:
            self._live_turns += 1
            return True
        self._live_turns = 0
        return False

    def _forget_empty(self) -> None:
        self._ordinary = {flow: queue for flow, queue in self._ordinary.items() if queue}


def _of_one_lane(queue: deque[Sequence], most: int) -> list[Sequence]:
    taken: list[Sequence] = []
    while queue and len(taken) < most and (not taken or queue[0].lane is taken[0].lane):
        taken.append(queue.popleft())
    return taken

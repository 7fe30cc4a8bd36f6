"""Queue of finished images that wait for the decoder, and the choice of whose turn it is."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.engine.client import Flow
    from server.engine.fair_queue import Turns
    from server.engine.state.sequence import Sequence

LIVE_TURNS = 3
"""Number of consecutive turns of live frames after which waiting ordinary images have one.

So ordinary images have at least a quarter of the turns, as they are promised a quarter of the
device's time (``server/engine/live_share.py``).
"""


class DecoderQueue:
    """Queued frames of live streams, and queued ordinary images by flow.

    All live frames, and the images of each flow, keep the order in which they finished.

    Args:
        turns: service that the clients of ordinary images have received from the device.

    Attributes:
        live: queued frames of live streams.
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
        """Number of ordinary images that wait."""
        return sum(map(len, self._ordinary.values()))

    def add(self, sequence: Sequence) -> None:
        """Add an image that finished."""
        if sequence.live:
            self.live.append(sequence)
        else:
            self._ordinary.setdefault(sequence.flow, deque()).append(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """Remove an image; return False if it is not in this queue."""
        queue = self.live if sequence.live else self._ordinary.get(sequence.flow, deque())
        waits = sequence in queue
        if waits:
            queue.remove(sequence)
            self._forget_empty()
        return waits

    def take_live(self, max_images: int) -> list[Sequence]:
        """Take the next frames of live streams, all of one lane and autoencoder."""
        return _of_one_call(self.live, max_images)

    def take_ordinary(self, max_images: Callable[[Sequence], int]) -> list[Sequence]:
        """Take the next ordinary images of the flow whose turn it is, or none.

        They are all of one lane and autoencoder.

        Args:
            max_images: function that returns how many images of a flow may be taken, given the
                first of them; 0 if the flow must wait for others.
        """
        for flow in sorted(self._ordinary, key=self._turns.virtual_times_of):
            queue = self._ordinary[flow]
            if count := max_images(queue[0]):
                taken = _of_one_call(queue, count)
                self._forget_empty()
                return taken
        return []

    def live_turn(self) -> bool:
        """Whether the next decoder call is for live frames, on a device where both share its calls.

        Live frames go first. While ordinary images wait, they have every turn after ``LIVE_TURNS``
        turns of live frames.
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


def _of_one_call(queue: deque[Sequence], max_images: int) -> list[Sequence]:
    taken: list[Sequence] = []
    while queue and len(taken) < max_images and (not taken or _alike(queue[0], taken[0])):
        taken.append(queue.popleft())
    return taken


def _alike(one: Sequence, other: Sequence) -> bool:
    return one.lane is other.lane and one.task.tiny == other.task.tiny

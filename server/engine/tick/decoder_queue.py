"""Finished images that wait for the decoder, and whose turn it is."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.state.sequence import Sequence

LIVE_TURNS = 3
"""Turns in a row of live frames after which ordinary images that wait have one.

So ordinary images have at least a quarter of the turns, as they are promised a quarter of the
device's time (``server/engine/live_share.py``).
"""


class DecoderQueue:
    """Frames of live streams and ordinary images, each in the order in which they finished.

    Attributes:
        live: frames of live streams.
        ordinary: all other images.
    """

    def __init__(self) -> None:
        self.live: deque[Sequence] = deque()
        self.ordinary: deque[Sequence] = deque()
        self._live_turns = 0

    def __len__(self) -> int:
        return len(self.live) + len(self.ordinary)

    def add(self, sequence: Sequence) -> None:
        """Take in an image that finished."""
        self._of(sequence).append(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """Forget an image; False if it does not wait here."""
        queue = self._of(sequence)
        waits = sequence in queue
        if waits:
            queue.remove(sequence)
        return waits

    def turn(self) -> deque[Sequence]:
        """The queue that the next call of the decoder is to take images from.

        Live frames go first. While ordinary images wait, every turn after ``LIVE_TURNS`` of live
        frames is theirs.
        """
        if not self.ordinary:
            self._live_turns = 0
            return self.live
        if self.live and self._live_turns < LIVE_TURNS:
            self._live_turns += 1
            return self.live
        self._live_turns = 0
        return self.ordinary

    def _of(self, sequence: Sequence) -> deque[Sequence]:
        return self.live if sequence.live else self.ordinary

"""Counts of live streams: of one session, and of all together."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from server.latencies import Latencies

__all__ = ["FRAME_OUTCOMES", "SessionCounts", "StreamCounts"]

Outcome: TypeAlias = Literal["sent", "skipped", "dropped", "failed"]
FRAME_OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

LATENCY_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
RECENT_S: Final = 10.0
MAX_LATENCIES: Final = 256


@dataclass(slots=True)
class StreamCounts:
    """Counts of all sessions since the start.

    Attributes:
        opened: number of opened sessions.
        frames: number of frames by outcome; a skipped frame is sent too, but counted only as
            skipped.
        latencies: latencies of frames that were sent and not skipped, from the arrival of their
            input.
    """

    opened: int = 0
    frames: Counter[Outcome] = field(default_factory=Counter["Outcome"])
    latencies: Latencies = field(default_factory=lambda: Latencies(LATENCY_BUCKETS_S))


class SessionCounts:
    """Counts of one session, which are also added to those of all sessions.

    Args:
        of_all: counts of all sessions.
    """

    def __init__(self, of_all: StreamCounts) -> None:
        self.received = 0
        self.frames: Counter[Outcome] = Counter()
        self._of_all = of_all
        self._began = monotonic()
        self._sent_at: deque[float] = deque()
        self._latencies: deque[float] = deque(maxlen=MAX_LATENCIES)

    def count(self, outcome: Outcome) -> None:
        """Count a frame that was not sent."""
        self.frames[outcome] += 1
        self._of_all.frames[outcome] += 1

    def count_sent(self, latency_s: float, *, skipped: bool) -> None:
        """Count a frame that was sent.

        Args:
            latency_s: seconds since the arrival of its input.
            skipped: whether it repeats the image before it.
        """
        self._sent_at.append(monotonic())
        self._forget()
        self.count("skipped" if skipped else "sent")
        if skipped:
            return
        self._latencies.append(latency_s)
        self._of_all.latencies.add(latency_s)

    def statistics(self, in_flight: int) -> Mapping[str, Any]:
        """Statistics for the client.

        Args:
            in_flight: number of frames in the engine now.
        """
        self._forget()
        seconds = monotonic() - self._began
        p50, p95 = (
            (round(float(one), 4) for one in np.quantile(self._latencies, (0.5, 0.95)))
            if self._latencies
            else (None, None)
        )
        return {
            "seconds": round(seconds, 3),
            "received": self.received,
            "frames": self.frames["sent"] + self.frames["skipped"],
            "skipped": self.frames["skipped"],
            "dropped": self.frames["dropped"],
            "failed": self.frames["failed"],
            "in_flight": in_flight,
            "fps": round(len(self._sent_at) / min(RECENT_S, max(seconds, 0.001)), 2),
            "latency_p50_s": p50,
            "latency_p95_s": p95,
        }

    def _forget(self) -> None:
        before = monotonic() - RECENT_S
        while self._sent_at and self._sent_at[0] < before:
            self._sent_at.popleft()

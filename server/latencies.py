"""Histograms of times."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["Latencies"]


@dataclass(slots=True)
class Latencies:
    """A histogram of seconds.

    Attributes:
        bounds: inclusive upper bounds in seconds, ascending, of all buckets but the last, which has
            none.
        counts: number of values in each bucket.
        total_s: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """Add a value."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

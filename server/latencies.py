"""Histograms of times."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["Latencies"]


@dataclass(slots=True)
class Latencies:
    """A histogram of seconds.

    Attributes:
        bounds: of the buckets but the last, which has none; each in seconds, inclusive, rising.
        counts: by bucket.
        total_s: of all that were counted.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

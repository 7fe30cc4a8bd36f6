"""Results of running streams."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

CAMERA_FPS = 40
"""Frame rate of clients that send frames regardless of the output; only the newest is used."""

SETTLING_S = 0.7
"""Seconds before frames are counted."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of streams that ran for a while.

    Attributes:
        seconds: seconds from the start to the last frame.
        latencies: seconds from input to output of every frame, by stream.
        device_s: seconds that the device would need for the networks alone, at the same numbers of
            rows per tick.
        ordinary: number of images of ordinary requests made at the same time.
        rows: total number of denoiser rows by stream.
    """

    seconds: float
    latencies: list[list[float]]
    device_s: float = 0.0
    ordinary: int = 0
    rows: list[int] = field(default_factory=list[int])

    @property
    def frames(self) -> int:
        """Number of frames of all streams."""
        return sum(map(len, self.latencies))

    @property
    def rate(self) -> float:
        """Frames per second of all streams together."""
        return self.frames / self.seconds

    @property
    def of_limit(self) -> float:
        """Fraction of the time that the networks alone would need."""
        return self.device_s / self.seconds

    @property
    def middle_s(self) -> float:
        """Median latency."""
        return float(np.median(self._all))

    @property
    def late_s(self) -> float:
        """95th percentile of the latency."""
        return float(np.percentile(self._all, 95))

    @property
    def frames_evenness(self) -> float:
        """Ratio of the worst to the best frame rate among the streams."""
        counts = [len(one) for one in self.latencies]
        return min(counts) / max(counts)

    @property
    def device_evenness(self) -> float:
        """Ratio of the least to the most denoiser rows among the streams."""
        return min(self.rows) / max(self.rows)

    @property
    def _all(self) -> list[float]:
        return [one for stream in self.latencies for one in stream]

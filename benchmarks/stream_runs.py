"""What came of running some streams for a while."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

CAMERA_FPS = 40
"""Of clients that send frames whatever comes back: the newest one wins."""

SETTLING_S = 0.7
"""Before the frames are counted."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Streams that ran for a while.

    Attributes:
        seconds: from the start to the last frame.
        latencies: seconds from input to output of every frame, by stream.
        device_s: that the device would need for the networks alone, for as many rows a tick.
        ordinary: images that were made beside the streams.
        rows: of the denoiser by stream, in all.
    """

    seconds: float
    latencies: list[list[float]]
    device_s: float = 0.0
    ordinary: int = 0
    rows: list[int] = field(default_factory=list[int])

    @property
    def frames(self) -> int:
        """Of all streams."""
        return sum(map(len, self.latencies))

    @property
    def rate(self) -> float:
        """Frames a second of all streams together."""
        return self.frames / self.seconds

    @property
    def of_limit(self) -> float:
        """Share of the time in which the networks worked."""
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
        """Worst over best frames a second."""
        counts = [len(one) for one in self.latencies]
        return min(counts) / max(counts)

    @property
    def device_evenness(self) -> float:
        """Worst over best rows of the denoiser."""
        return min(self.rows) / max(self.rows)

    @property
    def _all(self) -> list[float]:
        return [one for stream in self.latencies for one in stream]

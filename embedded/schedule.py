"""Progress of a training run, in steps or time, and its learning rate."""

import math
import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class TrainingClock:
    """Progress from 0 to 1, by whichever limit is reached first; also across resumed runs.

    `steps` and `minutes` are limits (None: no limit); `step` counts the finished steps and
    `spent_s` the seconds of earlier runs.
    """

    steps: int | None
    minutes: float | None
    step: int = 0
    spent_s: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, earlier runs included."""
        return self.spent_s + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Fraction of the training done, by steps or by time, whichever is larger."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, peak: float, *, warm_up: int, floor: float) -> float:
        """Linear warm-up over `warm_up` steps, then a cosine down to `floor` times the peak."""
        cosine = floor + (1 - floor) * (1 + math.cos(math.pi * self.progress)) / 2
        return peak * cosine * min(1.0, (self.step + 1) / warm_up)

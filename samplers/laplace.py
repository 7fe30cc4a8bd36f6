"""A spacing at the quantiles of a Laplace distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing, finite_start

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


FLOOR = 1e-5
"""Added to probabilities, as in the source, so that tails end 11.5 scales from the middle."""


class Laplace(LevelSpacing, frozen=True):
    """log(sigma / alpha) at evenly spaced quantiles of a Laplace distribution.

    Most steps lie near ``mean``, as do the levels at which Hang et al. train (arXiv 2407.03297).
    If only the first or the last level lies outside the model's range, it is moved to the end of
    the range. If others do as well, the distribution is truncated to the range instead; the source
    moves them all to its end, which gives steps of length 0.
    """

    summary: ClassVar[str] = "Most steps at middle noise: quantiles of a Laplace distribution."
    source: ClassVar[str] = "Hang et al. (arXiv 2407.03297); ComfyUI, get_sigmas_laplace."
    name: Literal["laplace"] = "laplace"
    mean: float = Field(
        default=0.0, ge=-5, le=5, description="Middle of log sigma, where most steps are."
    )
    scale: float = Field(
        default=0.5, ge=0.1, le=5, description="How far the steps spread about the middle."
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        first, last = self._range(schedule, t_start, t_end)
        return self._times(schedule, _between(first, last, count))

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        first, last = self._range(schedule, schedule.t_start, schedule.t_end)
        spread = _quantiles(steps)
        if (spread[1:] >= first).any() or (spread[:-1] <= last).any():
            spread = _between(first, last, steps)
        return self._times(schedule, np.clip(spread, last, first))

    def _range(self, schedule: Levels, t_start: float, t_end: float) -> F64:
        """Both ends of the range, in scales from the mean."""
        ends = -schedule.half_log_snr(np.array([finite_start(schedule, t_start), t_end]))
        return (ends - self.mean) / self.scale

    def _times(self, schedule: Levels, spread: F64) -> F64:
        return schedule.time_of_half_log_snr(-(self.mean + self.scale * spread))


def _quantiles(count: int) -> F64:
    """Evenly spaced quantiles of the whole distribution, decreasing, in scales from its mean."""
    off_middle = np.linspace(0.5, -0.5, count)
    return -np.sign(off_middle) * np.log(1 - 2 * np.abs(off_middle) + FLOOR)


def _between(first: float, last: float, count: int) -> F64:
    """Evenly spaced quantiles between two points, both included.

    Of the probabilities below and above a quantile the smaller one is used, to avoid cancellation.
    """
    done = np.linspace(0, 1, count)
    above = (1 - done) * _tail(first) + done * _tail(last)
    below = (1 - done) * _tail(-first) + done * _tail(-last)
    is_below = below < above
    return np.where(is_below, 1, -1) * np.log(2 * np.where(is_below, below, above))


def _tail(spread: float) -> float:
    """The probability above a point that is given in scales from the mean."""
    half = np.exp(-abs(spread)) / 2
    return float(half if spread > 0 else 1 - half)

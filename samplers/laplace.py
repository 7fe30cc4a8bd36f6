"""Levels at the quantiles of a Laplace distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing, finite_start

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


FLOOR = 1e-5
"""Added to probabilities, as in the source: the tails end 11.5 scales from the middle."""


class Laplace(LevelSpacing, frozen=True):
    """log(sigma / alpha) at even quantiles of a Laplace distribution.

    Most steps lie about ``mean``, as the levels at which Hang et al. train do (arXiv 2407.03297).
    Where the first or the last one lies outside the model's range it is put at the end of it.
    Where more of them would, which the source puts there too, so that steps have no length, the
    distribution is cut off at the range instead.
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
        """Both ends in scales from the middle."""
        ends = -schedule.half_log_snr(np.array([finite_start(schedule, t_start), t_end]))
        return (ends - self.mean) / self.scale

    def _times(self, schedule: Levels, spread: F64) -> F64:
        return schedule.time_of_half_log_snr(-(self.mean + self.scale * spread))


def _quantiles(count: int) -> F64:
    """Even quantiles of the whole distribution, falling, in scales from its middle."""
    off_middle = np.linspace(0.5, -0.5, count)
    return -np.sign(off_middle) * np.log(1 - 2 * np.abs(off_middle) + FLOOR)


def _between(first: float, last: float, count: int) -> F64:
    """Even quantiles between two points, which are the first and the last.

    Of the probabilities below and above a point the smaller one is used, which keeps its digits.
    """
    done = np.linspace(0, 1, count)
    above = (1 - done) * _tail(first) + done * _tail(last)
    below = (1 - done) * _tail(-first) + done * _tail(-last)
    is_below = below < above
    return np.where(is_below, 1, -1) * np.log(2 * np.where(is_below, below, above))


def _tail(spread: float) -> float:
    """The probability above a point, in scales from the middle."""
    half = np.exp(-abs(spread)) / 2
    return float(half if spread > 0 else 1 - half)

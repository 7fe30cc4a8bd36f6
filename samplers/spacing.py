"""The interface of spacings, which place the steps of a run over the noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel, Field
from typing_extensions import override

from samplers.plan_error import PlanError

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Spacing(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """One way to choose the times of a run.

    ``evaluated`` gives the times of the N evaluations of a run that ends on the clean picture;
    ``fill`` gives times over a given range, including both ends.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    needs_whole_timesteps: ClassVar[bool] = False
    """Whether the spacing suits only models trained at whole timesteps."""
    name: str

    @property
    def integer_timesteps(self) -> bool:
        """Whether the denoiser is given whole timesteps, whatever the levels are."""
        return False

    @property
    def own_steps(self) -> int | None:
        """The only number of steps that this spacing supports; None if it supports any."""
        return None

    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        """``count`` decreasing times from ``t_start`` to ``t_end``."""
        return schedule.uniform(count, t_start, t_end)

    def evaluated(self, schedule: Levels, steps: int) -> F64:
        """The ``steps`` decreasing times at which a run to the clean picture evaluates.

        Raises:
            ValueError: the schedule or the number of steps does not suit this spacing.
        """
        return self.fill(schedule, steps, schedule.t_start, schedule.t_end)


class LevelSpacing(Spacing, frozen=True):
    """A spacing that places noise levels, so its times generally lie between trained timesteps."""

    whole: bool = Field(
        default=False,
        description=(
            "Round the timesteps that the denoiser is given to whole ones, as diffusers does; for "
            "models trained on whole timesteps."
        ),
    )

    @property
    @override
    def integer_timesteps(self) -> bool:
        return self.whole


class ListedSpacing(Spacing, frozen=True):
    """A spacing that takes its times from a list, and so cannot fill a given range."""

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        raise ValueError(
            f"spacing is {self.name!r}, which has times of its own; leave t_start and t_end out."
        )


def finite_start(schedule: Levels, t_start: float) -> float:
    """The start time, or one just below it where there is no signal (flow matching at t = 1)."""
    if np.isfinite(schedule.half_log_snr(np.array(t_start))):
        return t_start
    return t_start * (1 - 1e-3)


def times_between(schedule: Levels, shares: F64, t_start: float, t_end: float) -> F64:
    """Times between two noise levels at which given fractions of the way are still ahead.

    Args:
        schedule: schedule of the model.
        shares: fractions of the difference of the levels, decreasing from 1 to 0, ``[times]``.
        t_start: time of the first level.
        t_end: time of the last level.
    """
    first, last = schedule.noise_level(np.array([t_start, t_end]))
    return schedule.time_of_noise_level(last + (first - last) * shares)


def times_of_shares(schedule: Levels, shares: F64) -> F64:
    """Times at which the noise level is a given fraction of the noisiest one.

    Args:
        schedule: schedule of the model.
        shares: fractions, decreasing from 1, ``[steps]``. If the last one would be below the
            cleanest trained level, the levels are stretched to end there.
    """
    first, last = schedule.noise_level(np.array([schedule.t_start, schedule.t_end]))
    levels = first * shares
    if levels[-1] < last:
        levels = last + (levels - levels[-1]) * (first - last) / (first - levels[-1])
    return schedule.time_of_noise_level(levels)


def refuse_more_than_trained(trained: int, steps: int, field: str = "steps") -> None:
    """Refuse a number above that of the trained timesteps.

    Raises:
        PlanError: ``steps`` is above ``trained``.
    """
    if steps > trained:
        raise PlanError(
            field,
            f"{field} is {steps}; at most {trained}, the number of the model's trained timesteps, "
            "is allowed.",
        )

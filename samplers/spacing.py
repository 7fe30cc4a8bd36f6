"""What every spacing declares: how the steps of a run are laid out over the noise levels."""

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
    ``fill`` fills a given range, both ends included.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    needs_whole_timesteps: ClassVar[bool] = False
    """Whether it suits only models that were trained at whole timesteps."""
    name: str

    @property
    def integer_timesteps(self) -> bool:
        """Whether the denoiser is told whole timesteps, whatever the levels are."""
        return False

    @property
    def own_steps(self) -> int | None:
        """The one number of steps that this layout has; None where any will do."""
        return None

    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        """``count`` falling times from ``t_start`` to ``t_end``."""
        return schedule.uniform(count, t_start, t_end)

    def evaluated(self, schedule: Levels, steps: int) -> F64:
        """The ``steps`` falling times at which a run to the clean picture evaluates.

        Raises:
            ValueError: the schedule or so many steps do not suit this spacing.
        """
        return self.fill(schedule, steps, schedule.t_start, schedule.t_end)


class LevelSpacing(Spacing, frozen=True):
    """A spacing that places noise levels, so that its times fall between the trained ones."""

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
    """Flow matching has no signal at all at t = 1: logarithmic spacings start just below."""
    if np.isfinite(schedule.half_log_snr(np.array(t_start))):
        return t_start
    return t_start * (1 - 1e-3)


def times_between(schedule: Levels, shares: F64, t_start: float, t_end: float) -> F64:
    """Times on the way from one noise level to another, at which these shares of it are left.

    Args:
        schedule: of the model.
        shares: falling from 1 to 0, ``[times]``.
        t_start: time of the first level.
        t_end: time of the last level.
    """
    first, last = schedule.noise_level(np.array([t_start, t_end]))
    return schedule.time_of_noise_level(last + (first - last) * shares)


def times_of_shares(schedule: Levels, shares: F64) -> F64:
    """Times at which these shares of the noisiest level are left.

    Args:
        schedule: of the model.
        shares: falling from 1, ``[steps]``. Where the last would be below the cleanest trained
            level they are stretched to end there.
    """
    first, last = schedule.noise_level(np.array([schedule.t_start, schedule.t_end]))
    levels = first * shares
    if levels[-1] < last:
        levels = last + (levels - levels[-1]) * (first - last) / (first - levels[-1])
    return schedule.time_of_noise_level(levels)


def refuse_more_than_trained(trained: int, steps: int, field: str = "steps") -> None:
    """Refuse a number beyond the trained timesteps.

    Raises:
        PlanError: ``steps`` is above ``trained``.
    """
    if steps > trained:
        raise PlanError(
            field,
            f"{field} is {steps}; the model has {trained} trained timesteps, which is the most.",
        )

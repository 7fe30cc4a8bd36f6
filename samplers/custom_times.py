"""A spacing whose times are listed in the request."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan_error import PlanError
from samplers.spacing import ListedSpacing

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Custom(ListedSpacing, frozen=True):
    """Evaluates at the listed times and steps from the last one to the clean picture.

    Times are in the schedule's own units: trained timesteps of a Stable Diffusion model, not
    necessarily whole; sigma in (0, 1] on flow matching, after the shift; sigma on an EDM model.
    """

    summary: ClassVar[str] = "Custom list of times, one for each step."
    source: ClassVar[str] = "diffusers, set_timesteps(timesteps=...) and (sigmas=...)."
    name: Literal["custom"] = "custom"
    times: tuple[float, ...] = Field(
        default=(),
        max_length=1000,
        # JSON has lists, which strict validation does not accept as tuples.
        strict=False,
        description=(
            "Strictly decreasing times to evaluate at, in the model's own units; as many as steps."
        ),
    )

    @property
    @override
    def own_steps(self) -> int | None:
        return len(self.times) or None

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if not self.times:
            raise PlanError(
                "spacing.times",
                "spacing.times is empty; it must list one time for each step, in decreasing order.",
            )
        if steps != len(self.times):
            raise PlanError(
                "steps",
                f"steps is {steps}; it must be {len(self.times)}, the number of entries in "
                "spacing.times.",
            )
        for before, after in zip(self.times, self.times[1:], strict=False):
            if after >= before:
                raise PlanError(
                    "spacing.times",
                    f"spacing.times go from {before:g} to {after:g}; each must be below the one "
                    "before it.",
                )
        first, last = self.times[0], self.times[-1]
        if not schedule.t_start >= first >= last >= schedule.t_end:
            raise PlanError(
                "spacing.times",
                f"spacing.times go from {first:g} to {last:g}; this model has times from "
                f"{schedule.t_start:g} to {schedule.t_end:g}.",
            )
        return np.array(self.times)

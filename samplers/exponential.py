"""A spacing that is even in log sigma, with sigma as other programs define it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Exponential(LevelSpacing, frozen=True):
    """Even in log sigma (k-diffusion's ``get_sigmas_exponential``).

    What k-diffusion and programs built on it call sigma is sigma / alpha here, so with ``rho`` 1
    this equals ``logsnr`` up to rounding on variance-preserving and EDM schedules. On flow matching
    they use sigma itself, and the two differ: the times then fall from 1 by a constant factor.
    """

    summary: ClassVar[str] = "Even in log sigma; differs from logsnr only on flow matching models."
    source: ClassVar[str] = "k-diffusion, get_sigmas_exponential and get_sigmas_polyexponential."
    name: Literal["exponential"] = "exponential"
    rho: float = Field(
        default=1.0,
        ge=0.25,
        le=4,
        description="Power of the steps in log sigma, 1 for even ones; larger values spend more "
        "steps at low noise. k-diffusion and ComfyUI call it polyexponential.",
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        first, last = np.log(schedule.noise_level(np.array([t_start, t_end])))
        left = np.linspace(1, 0, count) ** self.rho
        return schedule.time_of_noise_level(np.exp(last + left * (first - last)))

"""A spacing that is even in the arctangent of sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class KLOptimal(LevelSpacing, frozen=True):
    """Even in ``arctan(sigma)``, the closed form of Align Your Steps for Gaussian data.

    Sabour et al. (arXiv 2404.14507) choose levels that minimise a bound on the divergence from the
    data. For Gaussian data with standard deviation 1 these levels are optimal.
    """

    summary: ClassVar[str] = "Even in arctan(sigma): optimal for Gaussian data."
    source: ClassVar[str] = "Align Your Steps (arXiv 2404.14507); ComfyUI and AUTOMATIC1111."
    name: Literal["kl_optimal"] = "kl_optimal"
    endpoint: bool = Field(
        default=True,
        description="Evaluate at the cleanest level too, as in ComfyUI; if false, as in "
        "AUTOMATIC1111, the last evaluation is one stride above.",
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        first, last = np.arctan(schedule.noise_level(np.array([t_start, t_end])))
        return schedule.time_of_noise_level(np.tan(np.linspace(first, last, count)))

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        count = steps if self.endpoint else steps + 1
        return self.fill(schedule, count, schedule.t_start, schedule.t_end)[:steps]

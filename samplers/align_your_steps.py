"""Published sampling schedules, each optimized for one model."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan_error import PlanError
from samplers.spacing import ListedSpacing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from samplers.levels import F64, Levels

TIMESTEPS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
        "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
    }
)
"""Timesteps out of 1000 trained ones that bound ten steps."""
# fmt: off
SIGMAS: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        "svd": (
            700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002,
        ),
        "sd15_32": (
            14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065,
            3.5195609, 3.13490466, 2.79228788, 2.48773628, 2.21663865, 1.97508351, 1.7793172,
            1.61475335, 1.46540953, 1.314849, 1.16642497, 1.03475547, 0.91573744, 0.80748169,
            0.71202361, 0.621739, 0.53065202, 0.4529096, 0.37491455, 0.27461819, 0.2011529,
            0.14105873, 0.06682881, 0.03166121, 0.015,
        ),
        "sdxl_32": (
            14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704,
            3.27407457, 2.74396527, 2.29968659, 1.95448514, 1.67108715, 1.42878152, 1.23181009,
            1.06789649, 0.92579443, 0.80290886, 0.69660121, 0.60436903, 0.52852552, 0.46773344,
            0.41393379, 0.36258186, 0.31008517, 0.26518925, 0.22326461, 0.17653877, 0.13959192,
            0.10587381, 0.05519369, 0.02877334, 0.015,
        ),
        "gits_sd15": (
            14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.24, 0.156, 0.104, 0.094, 0.029,
        ),
        "gits_sdxl": (
            14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029,
        ),
    }
)
# fmt: on
"""Noise levels that bound the steps. The svd table is the authors'. The 32-level tables extend the
authors' method and the gits tables come from the search of arXiv 2405.11326, both as in Forge."""
TRAINED: Final = 1000
START_TOLERANCE: Final = 0.1
"""Largest relative difference between a schedule's noisiest level and the first of the table."""


class AlignYourSteps(ListedSpacing, frozen=True):
    """Align Your Steps (Sabour et al., arXiv 2404.14507): tables that bound the error at 10 steps.

    GITS (Chen et al., arXiv 2405.11326) searches for such tables using the geometry of the
    sampling trajectories. A run of ten steps evaluates at the first ten entries and goes from the
    tenth to the clean picture, as in diffusers and ComfyUI. For other numbers of steps, log sigma
    is interpolated between the entries by index, as the authors do. The tables were optimized for
    the named models; on other models with the same timesteps they are a guess.
    """

    summary: ClassVar[str] = "Published optimal levels for about 10 steps of SD 1.5, SDXL or SVD."
    source: ClassVar[str] = "Sabour et al., arXiv 2404.14507; the authors' quick start."
    name: Literal["align_your_steps"] = "align_your_steps"
    table: Literal["sd15", "sdxl", "svd", "sd15_32", "sdxl_32", "gits_sd15", "gits_sdxl"] = Field(
        default="sd15",
        description=(
            "The model whose published table is used; those with 32 are for about 31 steps, and "
            "those with gits come from another method."
        ),
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        points = self._points(schedule)
        if steps == len(points) - 1:
            return points[:steps]
        index = np.linspace(0, len(points) - 1, steps + 1)
        between = np.interp(index, np.arange(len(points)), schedule.half_log_snr(points))
        return schedule.time_of_half_log_snr(between)[:steps]

    def _points(self, schedule: Levels) -> F64:
        """Times of the table's entries."""
        if self.table in TIMESTEPS:
            if schedule.whole_timesteps != TRAINED:
                raise PlanError(
                    "spacing.table",
                    f"spacing.table is {self.table!r}, which needs a model with {TRAINED} trained "
                    "timesteps; use 'logsnr' with this one.",
                )
            return np.array(TIMESTEPS[self.table], np.float64)
        sigmas = np.array(SIGMAS[self.table])
        noisiest = float(np.exp(-schedule.half_log_snr(np.array(schedule.t_start))))
        if not abs(noisiest / sigmas[0] - 1) < START_TOLERANCE:
            raise PlanError(
                "spacing.table",
                f"spacing.table is {self.table!r}, which starts at a sigma of {sigmas[0]:g}; this "
                f"model's noisiest is {noisiest:g}, so use 'karras' with it.",
            )
        return np.minimum(schedule.time_of_half_log_snr(-np.log(sigmas)), schedule.t_start)

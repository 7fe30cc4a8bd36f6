"""Published schedules that were optimised for one model each."""

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
"""Ten steps between trained timesteps of 1000."""
SIGMAS: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {"svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)}
)
"""Ten steps between noise levels, for models that were trained on a continuum of them."""
TRAINED: Final = 1000
START_TOLERANCE: Final = 0.1
"""How far, in share, a schedule's noisiest level may be from the first of the table."""


class AlignYourSteps(ListedSpacing, frozen=True):
    """Align Your Steps (Sabour et al., arXiv 2404.14507): tables that bound the error at 10 steps.

    Ten steps evaluate at the first ten entries and go from the tenth to the clean picture, as
    diffusers and ComfyUI do. Other counts interpolate log sigma between the entries by their
    index, as the authors do. The tables were found on the named models; on others with the same
    timesteps they are a guess.
    """

    summary: ClassVar[str] = "Published optimal levels for about 10 steps of SD 1.5, SDXL or SVD."
    source: ClassVar[str] = "Sabour et al., arXiv 2404.14507; the authors' quick start."
    name: Literal["align_your_steps"] = "align_your_steps"
    table: Literal["sd15", "sdxl", "svd"] = Field(
        default="sd15", description="The model whose published table is used."
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

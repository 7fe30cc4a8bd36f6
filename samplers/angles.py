"""A spacing that is even in the angle between signal and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Angles(LevelSpacing, frozen=True):
    """Even in ``arctan(sigma / alpha)``, from the noisiest level to the clean picture.

    A run of two steps, as for SANA-Sprint, is not even: its second angle is ``second`` (1.3 by
    default), whatever the first. On a flow-matching schedule the times are ``sin / (cos + sin)``
    of the angles, which is what the network is conditioned on.
    """

    summary: ClassVar[str] = "Even in the angle of TrigFlow; for SANA-Sprint and related models."
    source: ClassVar[str] = "SANA-Sprint (arXiv 2503.09641); sCM (arXiv 2410.11081), section 3."
    name: Literal["angles"] = "angles"
    second: float = Field(
        default=1.3,
        gt=0,
        lt=np.pi / 2,
        description="Angle in radians of the second step in a run of two; 0.785 is half way.",
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        first, last = _angle(schedule, t_start), _angle(schedule, t_end)
        return _times(schedule, np.linspace(first, last, count))

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        angles = np.linspace(_angle(schedule, schedule.t_start), 0, steps, endpoint=False)
        if steps == 2:
            angles[1] = self.second
        return _times(schedule, angles)


def _angle(schedule: Levels, t: float) -> float:
    alpha, sigma = schedule.level(np.array(t))
    return float(np.arctan2(sigma, alpha))


def _times(schedule: Levels, angles: F64) -> F64:
    # At pure noise the log is -inf.
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(np.tan(np.pi / 2 - angles))
    return schedule.time_of_half_log_snr(half_log_snr)

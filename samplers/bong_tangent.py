"""A spacing along two arctangent arcs that meet at a middle level."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing, times_between, times_of_shares

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class BongTangent(LevelSpacing, frozen=True):
    """Steps that grow down to a middle level and shrink after it, each part along an arctangent.

    Sigma runs from the model's noisiest level to 0. Departures from the source, which always
    starts at sigma 1: that is the noisiest level of flow-matching models, for which it is meant,
    but part way down on others. And where the source would take steps below the model's cleanest
    level, the levels are stretched here to end at that level.
    """

    summary: ClassVar[str] = "Small steps at both ends, along two arcs of an arc tangent."
    source: ClassVar[str] = "RES4LYF, bong_tangent_scheduler."
    name: Literal["bong_tangent"] = "bong_tangent"
    middle: float = Field(
        default=0.5, gt=0, lt=1, description="Share of sigma at which the arcs meet."
    )
    pivot: float = Field(
        default=0.6, ge=0.1, le=0.9, description="Share of the steps before the arcs meet."
    )
    slope: float = Field(
        default=0.2, gt=0, le=5, description="How steep the arcs are where they meet, in 40 steps."
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        shares = self._left(count - 1) if count > 1 else np.ones(1)
        return times_between(schedule, shares, t_start, t_end)

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        return times_of_shares(schedule, self._left(steps)[:steps])

    def _left(self, steps: int) -> F64:
        """Fractions of sigma that remain after 0 to ``steps`` steps, from 1 to 0."""
        points = steps + 2
        meeting = int(self.pivot * points)
        slope = 40 * self.slope / points
        if meeting < 2 or points - meeting < 2:
            # Too few steps for two arcs.
            return np.linspace(1, 0, steps + 1)
        # The pivot of the second arc is its own first point.
        upper = _arc(np.arange(meeting, dtype=np.float64) - meeting, slope)
        lower = _arc(np.arange(points - meeting, dtype=np.float64), slope)
        high = self.middle + (1 - self.middle) * upper
        return np.append(high[:-1], self.middle * lower)


def _arc(offsets: F64, slope: float) -> F64:
    """An arctangent at offsets from its pivot, scaled to fall from 1 to 0."""
    bend = np.arctan(-slope * offsets)
    return (bend - bend[-1]) / (bend[0] - bend[-1])

"""A spacing with small even steps at high noise, then growing steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing, times_between, times_of_shares

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class LinearQuadratic(LevelSpacing, frozen=True):
    """Half of the steps evenly in the first 2.5 % of sigma; the others grow quadratically.

    The two halves meet with equal slope. Made for flow-matching video models, whose first steps
    determine the motion (Polyak et al., Movie Gen, arXiv 2410.13720).
    """

    summary: ClassVar[str] = "Many small steps at the noisiest levels; for flow-matching models."
    source: ClassVar[str] = "Movie Gen (arXiv 2410.13720); Mochi 1 and ComfyUI, linear_quadratic."
    name: Literal["linear_quadratic"] = "linear_quadratic"
    threshold: float = Field(
        default=0.025,
        gt=0,
        lt=1,
        description="Share of sigma that the even steps cover; at most their share of the steps.",
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
        even = steps // 2
        i = np.arange(steps + 1, dtype=np.float64)
        if not even:
            return 1 - i
        slope = min(self.threshold / even, 1 / steps)
        growing = np.maximum(i - even, 0)
        return 1 - slope * i - (1 - slope * steps) * (growing / (steps - even)) ** 2

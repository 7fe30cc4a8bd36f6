"""Strategic stochastic sampling: jumps along a trajectory, followed by fresh noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class TCD(Sampler, frozen=True):
    """Trajectory consistency sampling (Zheng et al., arXiv 2402.19159, algorithm 4).

    Each step jumps along the trajectory to a point below the next one and noises the result up to
    the next one. One evaluation a step, 1 to 8 steps, for models distilled for it; the last step
    draws no noise. With ``gamma`` 0 the step is DDIM's; with 1 it jumps to the (nearly) clean
    picture and all noise is fresh.

    ``measure`` determines the point below: the time ``s = (1 - gamma) t'``, rounded down where
    trained timesteps are whole, as for TCD and Hyper-SD (arXiv 2404.13686); or the noise level
    ``sqrt(1 - gamma^2)`` times the next one, as for consistency trajectory models (Kim et al.,
    arXiv 2310.02279, gamma-sampling).
    """

    summary: ClassVar[str] = "Few-step sampler for trajectory consistency models and Hyper LoRAs."
    source: ClassVar[str] = "Zheng et al., arXiv 2402.19159, algorithm 4 (gamma-sampling)."
    default_spacing: ClassVar[str] = "lcm"
    name: Literal["tcd"] = "tcd"
    gamma: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description=(
            "Fraction of fresh noise: 0 is deterministic, 1 is full noise; called eta in diffusers."
        ),
    )
    measure: Literal["time", "noise"] = Field(
        default="time",
        description=(
            "What gamma is a fraction of: time, for TCD and Hyper-SD; or the noise level, for "
            "consistency trajectory models (CTM)."
        ),
    )

    @property
    @override
    def convergence_order(self) -> int:
        return 0

    @property
    @override
    def stochastic(self) -> bool:
        return self.gamma > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        grid = grid.landed()
        columns = Columns("x")
        x, D = columns["x"], columns.denoised
        tables: list[F64] = []
        for i in range(grid.steps):
            alpha, sigma = grid.alpha[i + 1], grid.sigma[i + 1]
            eps = (x - grid.alpha[i] * D) / grid.sigma[i]
            kept = sigma if i == grid.steps - 1 else self._kept(grid, i + 1)
            fresh = np.sqrt(max(sigma**2 - kept**2, 0))
            tables.append(columns.table(x=alpha * D + kept * eps + fresh * columns.noise))
        return Plan.of_steps(grid, tables)

    def _kept(self, grid: Grid, i: int) -> float:
        """Sigma at point i of the noise from the trajectory, as opposed to fresh noise."""
        if self.gamma == 0:
            return float(grid.sigma[i])
        if self.measure == "noise":
            return float(np.sqrt(1 - self.gamma**2) * grid.sigma[i])
        s = (1 - self.gamma) * grid.t[i]
        alpha, sigma = grid.schedule.level(np.floor(s) if grid.schedule.whole_timesteps else s)
        return float(grid.alpha[i] * sigma / alpha)

"""Strategic stochastic sampling of trajectory consistency models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.plan_error import PlanError
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid


class TCD(Sampler, frozen=True):
    """Trajectory consistency sampling (Zheng et al., arXiv 2402.19159, algorithm 4).

    Each step jumps along the trajectory to ``s = floor((1 - gamma) t')``, below the next time t',
    and noises the point there up to t'. One evaluation a step, for models distilled so, at 1 to 8
    steps. With ``gamma`` 0 the step is DDIM's; with 1 it renoises from the first trained step.
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
        if not grid.schedule.whole_timesteps:
            raise PlanError(
                "sampler",
                "sampler is 'tcd', which needs a model with whole trained timesteps; "
                "this model has none.",
            )
        columns = Columns("x")
        x, D = columns["x"], columns.denoised
        tables = []
        for i in range(grid.steps):
            alpha, sigma = grid.alpha[i + 1], grid.sigma[i + 1]
            if sigma == 0:
                tables.append(columns.table(x=D))
                continue
            eps = (x - grid.alpha[i] * D) / grid.sigma[i]
            s = np.floor((1 - self.gamma) * grid.t[i + 1])
            alpha_s, sigma_s = (alpha, sigma) if self.gamma == 0 else grid.schedule.level(s)
            decay = alpha / alpha_s
            fresh = np.sqrt(max(sigma**2 - (decay * sigma_s) ** 2, 0))
            jump = alpha_s * D + sigma_s * eps
            tables.append(columns.table(x=decay * jump + fresh * columns.noise))
        return Plan.of_steps(grid, tables)

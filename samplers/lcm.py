"""Multistep sampling of latent consistency models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.plan_error import PlanError
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


class LCM(Sampler, frozen=True):
    """Latent consistency sampling (Luo et al., arXiv 2310.04378, algorithm 3).

    Each step jumps to the clean picture through the consistency function and noises it again to
    the next level; the last jump is kept. One evaluation a step, stochastic, for models distilled
    so, at 1 to 8 steps.
    """

    summary: ClassVar[str] = "Few-step sampler for latent consistency models and LCM LoRAs."
    source: ClassVar[str] = "Luo et al., arXiv 2310.04378, algorithm 3; boundary of equation 6."
    default_spacing: ClassVar[str] = "lcm"
    name: Literal["lcm"] = "lcm"

    @property
    @override
    def convergence_order(self) -> int:
        return 0

    @property
    @override
    def stochastic(self) -> bool:
        return True

    @override
    def plan(self, grid: Grid) -> Plan:
        if not grid.schedule.whole_timesteps:
            raise PlanError(
                "sampler",
                "sampler is 'lcm', which needs a model with whole trained timesteps; "
                "this model has none.",
            )
        columns = Columns("x")
        tables = []
        for i in range(grid.steps):
            tau = TIMESTEP_SCALING * grid.t[i]
            total = tau**2 + SIGMA_DATA**2
            consistent = (SIGMA_DATA**2 / total) * columns["x"] + (
                tau / total**0.5
            ) * columns.denoised
            x = grid.alpha[i + 1] * consistent + grid.sigma[i + 1] * columns.noise
            tables.append(columns.table(x=x))
        return Plan.of_steps(grid, tables)

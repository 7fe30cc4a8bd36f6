"""Multistep sampling of latent consistency models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


class LCM(Sampler, frozen=True):
    """Latent consistency sampling (Luo et al., arXiv 2310.04378, algorithm 3).

    Each step jumps to the clean picture through the consistency function and noises the result to
    the next level; the last jump gives the final picture. One evaluation a step, stochastic, 1 to
    8 steps, for models distilled for it: LCM, DMD2 (arXiv 2405.14867) and, on their own schedules,
    flow-matching consistency models and SANA-Sprint (arXiv 2503.09641).

    For models with whole trained timesteps, the consistency function keeps a fraction of x that
    vanishes except near the clean end: the boundary condition of equation 6. Continuous-time
    networks contain their boundary condition, so for them the function is the denoised prediction
    alone.
    """

    summary: ClassVar[str] = "Few-step sampler for latent consistency models, LCM LoRAs and DMD2."
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
        columns = Columns("x")
        tables: list[F64] = []
        for i in range(grid.steps):
            skip, out = _boundary(grid, i)
            consistent = skip * columns["x"] + out * columns.denoised
            x = grid.alpha[i + 1] * consistent + grid.sigma[i + 1] * columns.noise
            tables.append(columns.table(x=x))
        return Plan.of_steps(grid, tables)


def _boundary(grid: Grid, i: int) -> tuple[float, float]:
    """Weights of x and of the denoised prediction in the consistency function at point i."""
    if not grid.schedule.whole_timesteps:
        return 0.0, 1.0
    tau = TIMESTEP_SCALING * float(grid.t[i])
    total = tau**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, tau / total**0.5

"""DDIM and its stochastic variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.first_order import first_order
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class DDIM(Sampler, frozen=True):
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502, equation 12).

    First order, one evaluation a step, no history. ``eta`` 0 solves the probability-flow ODE;
    ``eta`` 1 is ancestral sampling with the posterior's variance.
    """

    summary: ClassVar[str] = "First order and robust; eta adds noise, up to ancestral sampling."
    source: ClassVar[str] = "Song et al., arXiv 2010.02502, equation 12."
    name: Literal["ddim"] = "ddim"
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 is ancestral sampling.",
    )

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else 1

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        return ancestral_plan(grid.landed(), self.eta)


def ancestral_plan(grid: Grid, eta: float) -> Plan:
    """First-order steps that add ``eta`` times the noise of the posterior.

    Its standard deviation, ``eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)``, is DDIM's on
    a variance-preserving schedule and k-diffusion's ancestral ``sigma_up`` on any other.
    """
    alpha, sigma = grid.alpha, grid.sigma
    shrink = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])
    return renoised_plan(grid, eta * sigma[1:] * np.sqrt(np.maximum(1 - shrink**2, 0)))


def renoised_plan(grid: Grid, fresh: F64) -> Plan:
    """First-order steps that land below the next noise level and return to it with fresh noise.

    Args:
        grid: the points of the run.
        fresh: standard deviation of the fresh noise of each step, ``[N]``; at most the sigma of
            the level that the step ends at.
    """
    columns = Columns("x")
    x, D, noise = columns["x"], columns.denoised, columns.noise
    tables: list[F64] = []
    for i in range(grid.steps):
        kept = float(np.sqrt(grid.sigma[i + 1] ** 2 - fresh[i] ** 2))
        tables.append(columns.table(x=first_order(grid, i, x, D, kept) + fresh[i] * noise))
    return Plan.of_steps(grid, tables)

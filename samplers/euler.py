"""Euler in sigma space, plain and ancestral."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.churn import ChurnedSampler
from samplers.ddim import ancestral_plan, renoised_plan
from samplers.linear_multistep import Line
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64
    from samplers.plan import Plan


class Euler(ChurnedSampler, frozen=True):
    """Euler's method on ``d(x/alpha) / d(sigma/alpha) = eps``.

    First order, one evaluation a step. In exact arithmetic it equals DDIM with eta 0 on the same
    grid, on flow-matching models too. It has its own name because users look for it, and because
    it supports churn.
    """

    summary: ClassVar[str] = "First order; the same step as ddim with eta 0. s_churn adds noise."
    source: ClassVar[str] = "Karras et al., arXiv 2206.00364, algorithms 1 and 2, first order."
    name: Literal["euler"] = "euler"

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else 1

    @override
    def plain_plan(self, grid: Grid) -> Plan:
        return ancestral_plan(grid, 0.0)


class EulerAncestral(Sampler, frozen=True):
    """Euler steps with fresh noise ("Euler a").

    One evaluation a step, stochastic: the picture does not converge as the number of steps grows.
    """

    summary: ClassVar[str] = (
        "Euler with fresh noise at every step; images keep changing with the number of steps."
    )
    source: ClassVar[str] = "k-diffusion, sample_euler_ancestral; ComfyUI, its form for flows."
    name: Literal["euler_ancestral"] = "euler_ancestral"
    eta: float = Field(
        default=1.0, ge=0, le=1, description="Fraction of fresh noise; 0 is plain Euler."
    )
    below: Literal["posterior", "level"] = Field(
        default="posterior",
        description=(
            "How far below the next level a step goes before fresh noise is added: posterior, by"
            " the noise of the reverse process; level, to sigma' (1 - eta (1 - sigma' / sigma)) in"
            " the model's own sigma, which is less noise on flow-matching models (ComfyUI's)."
        ),
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
        if self.below == "posterior":
            return ancestral_plan(grid, self.eta)
        return renoised_plan(grid, _noise_by_level(grid, self.eta))


def _noise_by_level(grid: Grid, eta: float) -> F64:
    """Deviation of the fresh noise of each step, ``[N]`` (ComfyUI, sample_euler_ancestral_RF)."""
    s, alpha, sigma = Line.of_schedule(grid).s, grid.alpha[1:], grid.sigma[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - eta * (1 - s[1:] / s[:-1])
        # On every schedule alpha / sigma is 1 / s minus a constant, so both rise by as much.
        kept = alpha / (alpha / sigma + (1 / share - 1) / s[1:])
    return np.sqrt(np.maximum(sigma**2 - np.where(sigma > 0, kept, 0) ** 2, 0))

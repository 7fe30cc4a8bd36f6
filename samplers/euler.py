"""Euler in sigma space, plain and ancestral."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from samplers.churn import ChurnedSampler
from samplers.ddim import ancestral_plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.plan import Plan


class Euler(ChurnedSampler, frozen=True):
    """Euler's method on ``d(x/alpha) / d(sigma/alpha) = eps``.

    First order, one evaluation a step. In exact arithmetic it is DDIM with eta 0 on the same
    grid, on flow-matching models too; it has its own name because users look for it, and because
    it has churn.
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

    One evaluation a step, stochastic: does not converge to one picture as steps grow.
    """

    summary: ClassVar[str] = (
        "Euler with fresh noise at every step; images keep changing with the number of steps."
    )
    source: ClassVar[str] = "k-diffusion, sample_euler_ancestral."
    name: Literal["euler_ancestral"] = "euler_ancestral"
    eta: float = Field(
        default=1.0, ge=0, le=1, description="Fraction of fresh noise; 0 is plain Euler."
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
        return ancestral_plan(grid, self.eta)

"""DPM-Solver++: multistep exponential integrators in the denoised prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from samplers.first_order import direct_gain, first_order
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler
from samplers.step_order import LOWER_ORDER, LowerOrder, step_order

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class DPMSolverPP(Sampler, frozen=True):
    """DPM-Solver++ multistep (Lu et al., arXiv 2211.01095, algorithms 2 and appendix).

    Order 1 to 3, one evaluation a step. History: up to two predictions. Order 2 is commonly called
    "DPM++ 2M", and with ``variant`` sde "DPM++ 2M SDE". The last step to the clean picture is of
    first order, as the higher terms are infinite there.

    Order 3 is the authors' formula, which k-diffusion and diffusers share. It gives the second
    divided difference half of its weight in the Taylor expansion, so it converges with the second
    power of the step, with about 0.3 times the error of order 2. (diffusers' sde of order 3 also
    has a sign error; this follows k-diffusion.)

    With ``beta`` below 1 the ode variant has heavy ball momentum (Wizadwongsa et al., arXiv
    2307.11118): every step is ``x' = (sigma'/sigma) x + alpha' (1 - e^(-h)) d``, and d, the
    prediction with its differences, is blended into a velocity. This converges only with the first
    power of the step, in exchange for fewer divergence artifacts in few steps at high guidance
    scales, and keeps one more slot. Steps whose order is lowered to 1 have no momentum.

    Departure from the source: the order of the last steps is lowered whatever the number of steps,
    and to 1 where a step is long compared with the one before it; ``lower_order_final``
    "below_15_steps" lowers it as the authors do.
    """

    summary: ClassVar[str] = "The default: DPM++ 2M and its relatives; good from 10 steps."
    source: ClassVar[str] = "Lu et al., arXiv 2211.01095, equations 9 to 14."
    name: Literal["dpm_solver_pp"] = "dpm_solver_pp"
    order: Literal[1, 2, 3] = Field(default=2, description="Order of the multistep formula.")
    variant: Literal["ode", "sde"] = Field(
        default="ode", description="ode is deterministic; sde adds fresh noise at every step."
    )
    solver_type: Literal["midpoint", "taylor"] = Field(
        default="midpoint",
        description="Form of the second-order term; taylor is called heun in diffusers.",
    )
    lower_order_final: LowerOrder = Field(default=True, description=LOWER_ORDER)
    beta: float = Field(
        default=1.0,
        ge=0.1,
        le=1,
        description=(
            "Heavy ball momentum: weight of the new direction in the velocity; 1 is no momentum."
        ),
    )

    @model_validator(mode="after")
    def _momentum_is_of_the_ode(self) -> Self:
        if self.beta < 1 and self.variant == "sde":
            raise ValueError(
                f"beta is {self.beta:g}; with the variant 'sde' only 1, no momentum, is allowed."
            )
        return self

    @property
    @override
    def convergence_order(self) -> int:
        if self.stochastic:
            return 0
        return 1 if self.beta < 1 else min(self.order, 2)

    @property
    @override
    def stochastic(self) -> bool:
        return self.variant == "sde"

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "D1", "D2", *(("v",) if self.beta < 1 else ()))
        tables: list[F64] = []
        moving = False
        for i in range(grid.steps):
            order = step_order(grid, i, self.order, self.lower_order_final)
            correction = self._correction(grid, i, columns, order)
            velocity: dict[str, F64] = {}
            if self.beta < 1 and grid.sigma[i + 1] > 0 and (self.order == 1 or order > 1):
                gain = direct_gain(grid, i)
                v = columns.denoised + correction / gain
                if moving:
                    v = (1 - self.beta) * columns["v"] + self.beta * v
                correction = gain * (v - columns.denoised)
                velocity["v"], moving = v, True
            x = self._linear_part(grid, i, columns) + correction
            tables.append(columns.table(x=x, D1=columns.denoised, D2=columns["D1"], **velocity))
        return Plan.of_steps(grid, tables)

    def _linear_part(self, grid: Grid, i: int, columns: Columns) -> F64:
        x, D, noise = columns["x"], columns.denoised, columns.noise
        if self.variant == "ode":
            return first_order(grid, i, x, D)
        h = grid.half_log_snr[i + 1] - grid.half_log_snr[i]
        fresh = -np.expm1(-2 * h)
        ratio = grid.sigma[i + 1] / grid.sigma[i]
        return (
            ratio * np.exp(-h) * x
            + grid.alpha[i + 1] * fresh * D
            + grid.sigma[i + 1] * np.sqrt(fresh) * noise
        )

    def _correction(self, grid: Grid, i: int, columns: Columns, order: int) -> F64:
        """The terms in the first and second differences of the denoised prediction."""
        if order == 1:
            return 0 * columns.one
        lam, alpha = grid.half_log_snr, grid.alpha[i + 1]
        h = lam[i + 1] - lam[i]
        D0, D1, D2 = columns.denoised, columns["D1"], columns["D2"]
        r0 = (lam[i] - lam[i - 1]) / h
        first = (D0 - D1) / r0
        # The SDE's exponentials decay twice as fast (equation 14).
        z = -h if self.variant == "ode" else -2 * h
        if order == 2:
            if self.solver_type == "midpoint":
                return -0.5 * alpha * np.expm1(z) * first
            return alpha * (1 - np.expm1(z) / z) * first
        r1 = (lam[i - 1] - lam[i - 2]) / h
        older = (D1 - D2) / r1
        slope = first + r0 / (r0 + r1) * (first - older)
        bend = (first - older) / (r0 + r1)
        return alpha * ((1 - np.expm1(z) / z) * slope - ((np.expm1(z) - z) / z**2 - 0.5) * bend)

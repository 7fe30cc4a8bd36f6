"""SA-Solver: a stochastic Adams predictor-corrector."""

from __future__ import annotations

from math import factorial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

SERIES_TERMS = 20
"""Of the moments at short steps: beyond the last digit of float64."""


class SASolver(Sampler, frozen=True):
    """SA-Solver in the denoised prediction (Xue et al., arXiv 2309.05019, algorithm 1).

    Solves the SDE whose noise is ``tau`` times that of the reverse diffusion, at every level, by
    Adams steps: one evaluation a step, up to three predictions of history. The evaluation at the
    predicted point corrects that point, with the same noise in it, so corrector and predictor are
    one matrix. Deterministic at ``tau`` 0. The last step to the clean picture is of first order,
    and the last point is not corrected.

    Departure from the authors' code: weights of order 2 are exact by default. Theirs, which
    ``second_order`` rounded selects, hold for short steps, and overshoot where few steps are even
    in log SNR. No order is lowered at the end, which would change no step but one of order 3.
    """

    summary: ClassVar[str] = "Stochastic multistep predictor-corrector; tau sets the fresh noise."
    source: ClassVar[str] = "Xue et al., arXiv 2309.05019, equations 14 and 17, algorithm 1."
    name: Literal["sa_solver"] = "sa_solver"
    tau: float = Field(
        default=1.0,
        ge=0,
        le=1.6,
        description="Noise against that of the reverse diffusion: 0 is the ODE, 1 the usual SDE.",
    )
    predictor_order: Literal[1, 2, 3] = Field(default=2, description="Order of the predictor.")
    corrector_order: Literal[0, 2, 3] = Field(
        default=2, description="Order of the corrector; 0 is none."
    )
    second_order: Literal["exact", "rounded"] = Field(
        default="exact", description="Weights of order 2; rounded ones are the authors'."
    )

    @property
    @override
    def convergence_order(self) -> int:
        if self.stochastic:
            return 0
        if self.corrector_order == 0:
            # The first step is of order 1, for want of history.
            return min(self.predictor_order, 2)
        return min(self.corrector_order, self.predictor_order + 1)

    @property
    @override
    def stochastic(self) -> bool:
        return self.tau > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "D1", "D2", "D3")
        D, history = columns.denoised, [columns["D1"], columns["D2"], columns["D3"]]
        tables: list[F64] = []
        for i in range(grid.steps):
            x = columns["x"]
            if i > 0 and self.corrector_order > 0:
                # The predictor's terms go and the corrector's come; the noise stays. Starting from
                # x keeps what guidance or inpainting moved x by.
                x = x - self._predicted(grid, i - 1, history) + self._corrected(grid, i, D, history)
            shrink, fresh = self._linear_part(grid, i)
            x = shrink * x + self._predicted(grid, i, [D, *history[:-1]]) + fresh * columns.noise
            tables.append(columns.table(x=x, D1=D, D2=history[0], D3=history[1]))
        return Plan.of_steps(grid, tables)

    def _linear_part(self, grid: Grid, i: int) -> tuple[float, float]:
        """Factor of x, and deviation of the noise, in the step from point i."""
        h = grid.half_log_snr[i + 1] - grid.half_log_snr[i]
        if self.tau == 0:
            return grid.sigma[i + 1] / grid.sigma[i], 0.0
        shrink = grid.sigma[i + 1] / grid.sigma[i] * np.exp(-(self.tau**2) * h)
        return shrink, grid.sigma[i + 1] * np.sqrt(-np.expm1(-2 * self.tau**2 * h))

    def _predicted(self, grid: Grid, i: int, known: list[F64]) -> F64:
        """The predictions' part of the step from point i; ``known`` are those there and before."""
        order = min(self.predictor_order, self._allowed(grid, i))
        return self._integral(grid, i, known[:order], list(range(i, i - order, -1)))

    def _corrected(self, grid: Grid, i: int, arrived: F64, history: list[F64]) -> F64:
        """The same of the step to point i, with the prediction there."""
        order = min(self.corrector_order, self._allowed(grid, i - 1) + 1)
        known = [arrived, *history][:order]
        return self._integral(grid, i - 1, known, list(range(i, i - order, -1)))

    def _allowed(self, grid: Grid, i: int) -> int:
        """Highest order of the predictor in the step from point i."""
        return 1 if grid.sigma[i + 1] == 0 else i + 1

    def _integral(self, grid: Grid, i: int, known: list[F64], at: list[int]) -> F64:
        """``c alpha' int e^(-c (lam' - lam)) D(lam) dlam`` over the step from point i.

        c = 1 + tau^2, and D runs through the predictions ``known`` at the points ``at``.
        """
        shrink, _ = self._linear_part(grid, i)
        # What a constant prediction adds, finite also at pure noise and at the clean end.
        total = grid.alpha[i + 1] - grid.alpha[i] * shrink
        if len(known) == 1:
            return total * known[0]
        lam = grid.finite_half_log_snr
        h = lam[i + 1] - lam[i]
        z = (1 + self.tau**2) * h
        moments = grid.alpha[i + 1] * _moments(z, len(known))
        moments[0] = total
        rounded = self.second_order == "rounded" and np.isfinite(grid.half_log_snr[i])
        if len(known) == 2 and rounded:
            moments[1] = grid.alpha[i + 1] * z / 2
        nodes = (lam[at] - lam[i]) / h
        weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
        return sum((w * D for w, D in zip(weights, known, strict=True)), 0 * known[0])


def _moments(z: float, count: int) -> F64:
    """``z int_0^1 e^(-z (1 - v)) v^k dv`` for k = 0 .. count - 1."""
    if z < 1:
        # The recursion below would cancel.
        n = np.arange(SERIES_TERMS)
        return np.array(
            [
                z * sum((-z) ** j * factorial(k) / factorial(k + j + 1) for j in n.tolist())
                for k in range(count)
            ]
        )
    moments = [-np.expm1(-z)]
    for k in range(1, count):
        moments.append(1 - k / z * moments[-1])
    return np.array(moments)

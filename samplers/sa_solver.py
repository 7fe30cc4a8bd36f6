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
"""Terms of the series for the moments at short steps: enough for float64."""
SERIES = np.array(
    [[factorial(k) / factorial(k + j + 1) for j in range(SERIES_TERMS)] for k in range(4)]
)


class SASolver(Sampler, frozen=True):
    """SA-Solver in the denoised prediction (Xue et al., arXiv 2309.05019, algorithm 1).

    Solves, by Adams steps, the SDE whose noise at every level is ``tau`` times that of the reverse
    diffusion. One evaluation a step. History: up to three predictions. The evaluation at the
    predicted point corrects that point, which keeps its noise, so corrector and predictor are one
    matrix. Deterministic at ``tau`` 0. The last step to the clean picture is of first order, and
    the last point is not corrected.

    Departures from the authors' code: weights of order 2 are exact by default. Theirs, which
    ``second_order`` rounded selects, are an approximation for short steps that overshoots where few
    steps are even in log SNR. The order is not lowered at the end, which would affect only one step
    of order 3.
    """

    summary: ClassVar[str] = (
        "Stochastic multistep predictor-corrector; tau sets the amount of fresh noise."
    )
    source: ClassVar[str] = "Xue et al., arXiv 2309.05019, equations 14 and 17, algorithm 1."
    name: Literal["sa_solver"] = "sa_solver"
    tau: float = Field(
        default=1.0,
        ge=0,
        le=1.6,
        description="Noise relative to the reverse diffusion: 0 is the ODE, 1 the usual SDE.",
    )
    predictor_order: Literal[1, 2, 3] = Field(default=2, description="Order of the predictor.")
    corrector_order: Literal[0, 2, 3] = Field(
        default=2, description="Order of the corrector; 0 is no corrector."
    )
    second_order: Literal["exact", "rounded"] = Field(
        default="exact",
        description="Weights of order 2: exact, or rounded as in the authors' code.",
    )

    @property
    @override
    def convergence_order(self) -> int:
        if self.stochastic:
            return 0
        if self.corrector_order == 0:
            # The first step has no history and is of order 1.
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
        predictor: list[float] = []
        tables: list[F64] = []
        for i in range(grid.steps):
            x = columns["x"]
            if i > 0 and self.corrector_order > 0:
                # Replace the predictor's terms by the corrector's; the noise stays. Starting from x
                # preserves what guidance or inpainting changed in x.
                corrector = self._weights(grid, i - 1, i, min(self.corrector_order, i + 1))
                x = x - weighted(predictor, history) + weighted(corrector, [D, *history])
            order = 1 if grid.sigma[i + 1] == 0 else min(self.predictor_order, i + 1)
            predictor = self._weights(grid, i, i, order)
            shrink, fresh = linear_part(grid, i, self.tau)
            x = shrink * x + weighted(predictor, [D, *history]) + fresh * columns.noise
            tables.append(columns.table(x=x, D1=D, D2=history[0], D3=history[1]))
        return Plan.of_steps(grid, tables)

    def _weights(self, grid: Grid, i: int, newest: int, order: int) -> list[float]:
        rounded = self.second_order == "rounded"
        return adams_weights(grid, i, newest, order, self.tau, rounded=rounded)


def linear_part(grid: Grid, i: int, tau: float) -> tuple[float, float]:
    """The factor of x and the standard deviation of the noise in the step from point i."""
    ratio = float(grid.sigma[i + 1] / grid.sigma[i])
    if tau == 0:
        return ratio, 0.0
    # sigma' alpha / (sigma alpha') is e^-h.
    decay = float(ratio * grid.alpha[i] / grid.alpha[i + 1]) ** (tau**2)
    return ratio * decay, float(grid.sigma[i + 1] * np.sqrt(1 - decay**2))


def adams_weights(
    grid: Grid, i: int, newest: int, order: int, tau: float, *, rounded: bool = False
) -> list[float]:
    """Weights, in the step from point i, of the predictions at ``newest`` and the points before it.

    They integrate ``c alpha' int e^(-c (lam' - lam)) D(lam) dlam``, c = 1 + tau^2, for D the
    polynomial through these predictions.

    Args:
        grid: the points of the run.
        i: index of the point where the step starts.
        newest: index of the newest prediction's point: i for a predictor, i + 1 for a corrector.
        order: number of predictions to use, 1 to 4.
        tau: noise of the step relative to the reverse diffusion.
        rounded: whether weights of order 2 are rounded as in the authors' code.
    """
    shrink, _ = linear_part(grid, i, tau)
    # The contribution of a constant prediction, finite also at pure noise and at the clean end.
    total = float(grid.alpha[i + 1] - grid.alpha[i] * shrink)
    if order == 1:
        return [total]
    lam = grid.finite_half_log_snr
    h = lam[i + 1] - lam[i]
    z = (1 + tau**2) * h
    moments = grid.alpha[i + 1] * _moments(z, order)
    moments[0] = total
    if order == 2 and rounded and grid.alpha[i] > 0:
        moments[1] = grid.alpha[i + 1] * z / 2
    nodes = (lam[newest - np.arange(order)] - lam[i]) / h
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


def weighted(weights: list[float], predictions: list[F64]) -> F64:
    """The sum of the weighted predictions, as many as there are weights."""
    first, *others = (w * D for w, D in zip(weights, predictions, strict=False))
    return sum(others, first)


def _moments(z: float, count: int) -> F64:
    """``z int_0^1 e^(-z (1 - v)) v^k dv`` for k = 0 .. count - 1."""
    if z < 1:
        # The recursion below would cancel.
        return z * SERIES[:count] @ (-z) ** np.arange(SERIES_TERMS)
    moments = [-np.expm1(-z)]
    for k in range(1, count):
        moments.append(1 - k / z * moments[-1])
    return np.array(moments)

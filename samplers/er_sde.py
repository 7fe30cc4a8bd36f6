"""ER-SDE-Solver: a multistep solver of a reverse SDE whose noise falls faster than sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

POINTS: Final = 200
"""Points of the sums that approximate the integrals of orders 2 and 3, as in the authors' code."""


class ERSDE(Sampler, frozen=True):
    """Extended reverse-time SDE solver (Cui et al., arXiv 2309.06169, VP ER-SDE-Solver-1 to 3).

    With ``r = sigma / alpha``, a step to r' keeps ``phi(r') / phi(r)`` of the noise and draws the
    rest anew. ``phi(r) = r (exp(r^0.3) + 10)`` is the authors' choice, which lies between the ODE
    (phi = r) and the reverse diffusion (phi = r^2). One evaluation a step, stochastic. History: up
    to two predictions. The last step to the clean picture is of first order.

    The integrals are the authors' sums over 200 points of a step. Departures from their code: the
    sums are in float64, and a step from pure noise takes the limit in which none of it is kept,
    instead of starting from a slightly lower level.
    """

    summary: ClassVar[str] = "Stochastic multistep that draws less noise than the reverse SDE."
    source: ClassVar[str] = "Cui et al., arXiv 2309.06169, algorithms 1 to 3; ComfyUI."
    name: Literal["er_sde"] = "er_sde"
    order: Literal[1, 2, 3] = Field(
        default=3, description="Number of denoised predictions that a step uses."
    )

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
        columns = Columns("x", "D1", "D2")
        D, D1, D2 = columns.denoised, columns["D1"], columns["D2"]
        with np.errstate(divide="ignore"):
            r = grid.sigma / grid.alpha
        tables: list[F64] = []
        for i in range(grid.steps):
            # Deviation of the old noise, in units of the new level's sigma; 0 from pure noise.
            kept = np.exp(_log_excess(r[i + 1]) - _log_excess(r[i]))
            shrink = grid.sigma[i + 1] / grid.sigma[i] * kept
            x = shrink * columns["x"] + (grid.alpha[i + 1] - grid.alpha[i] * shrink) * D
            x = x + grid.sigma[i + 1] * np.sqrt(1 - kept**2) * columns.noise
            # A prediction at pure noise is infinitely far away, so the polynomial leaves it out.
            known = 1 + int(np.isfinite(r[: i + 1][-3:-1]).sum())
            order = 1 if grid.sigma[i + 1] == 0 else min(self.order, known)
            if order > 1:
                first, second = _moments(r[i], r[i + 1])
                slope = (D - D1) / (r[i] - r[i - 1])
                x = x + grid.alpha[i + 1] * first * slope
                if order > 2:
                    before = (D1 - D2) / (r[i - 1] - r[i - 2])
                    bend = (slope - before) / ((r[i] - r[i - 2]) / 2)
                    x = x + grid.alpha[i + 1] * second * bend
            tables.append(columns.table(x=x, D1=D, D2=D1))
        return Plan.of_steps(grid, tables)


def _log_excess(r: F64) -> F64:
    """``log(phi(r) / r)``, in logarithms because it outgrows float64 near pure noise."""
    return np.logaddexp(r**0.3, np.log(10))


def _log_phi(r: F64) -> F64:
    return np.log(r) + _log_excess(r)


def _moments(start: F64, end: F64) -> tuple[float, float]:
    """Weights of the first and second derivative of the prediction, by r, in a step."""
    length = (start - end) / POINTS
    at = end + np.arange(POINTS) * length
    share = np.exp(_log_phi(end) - _log_phi(at)) * length
    step = end - start
    return float(step + np.sum(share)), float(step**2 / 2 + np.sum((at - start) * share))

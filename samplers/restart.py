"""Restart sampling: reduce the noise, add fresh noise, reduce it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.dpm_solver_pp import DPMSolverPP
from samplers.euler import Euler
from samplers.grid import Grid
from samplers.heun import Heun
from samplers.in_turn import in_turn
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.plan import Plan

RHO = 7.0
"""The levels of a further descent are even in (sigma / alpha)^(1 / RHO)."""
BASES: dict[str, Sampler] = {
    "heun": Heun(),
    "euler": Euler(),
    "dpm_solver_pp": DPMSolverPP(lower_order_final=False),
}


class Restart(Sampler, frozen=True):
    """Restart sampling (Xu et al., arXiv 2306.14878, algorithm 1).

    A deterministic solver descends the grid to the point whose sigma / alpha is nearest to
    ``low``. From there the state is noised back up to ``high`` and descends again, ``restarts``
    times; then the rest of the grid follows. The noise contracts the errors made so far, while
    each descent is as accurate as an ODE solver. The noise level thus rises within the run. The
    steps of every descent count, and a solver with history starts afresh in each. Stochastic.

    Departures from the source: there is only one interval. Where ``high`` is not above the point
    turned at, the state is noised up to the point before it. The steps of a descent are a fraction
    of the run's, so that more steps refine both; they are even in sigma^(1/7), as in the source.
    """

    summary: ClassVar[str] = (
        "An ODE solver that repeats an interval with fresh noise, which shrinks earlier errors."
    )
    source: ClassVar[str] = "Xu et al., arXiv 2306.14878, algorithm 1."
    name: Literal["restart"] = "restart"
    base: Literal["heun", "euler", "dpm_solver_pp"] = Field(
        default="heun", description="Solver of each descent; heun takes two evaluations per step."
    )
    low: float = Field(
        default=0.1, ge=0.01, le=0.5, description="sigma / alpha at which it goes back up."
    )
    high: float = Field(default=2.0, ge=0.5, le=10, description="sigma / alpha that it goes up to.")
    restarts: int = Field(default=1, ge=1, le=10, description="How often it goes back up.")
    share: float = Field(
        default=0.25,
        ge=0.2,
        le=1,
        description=(
            "Steps of each further descent, as a fraction of the run's steps; at least 1 step."
        ),
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return BASES[self.base].evaluations_per_step

    @property
    @override
    def convergence_order(self) -> int:
        return 0

    @property
    @override
    def stochastic(self) -> bool:
        return True

    @override
    def steps_taken(self, steps: int) -> int:
        """Steps down the grid plus those of all further descents; a run of one step has none."""
        return steps if steps == 1 else steps + self.restarts * self._descent(steps)

    @override
    def plan(self, grid: Grid) -> Plan:
        base = BASES[self.base]
        if grid.steps == 1:
            return base.plan(grid)
        turn = self._turn(grid)
        again = self._interval(grid, turn)
        rest = grid.part(turn, grid.steps)
        return in_turn([grid.part(0, turn), *[again] * self.restarts, rest], base.plan)

    def _descent(self, steps: int) -> int:
        return max(1, round(self.share * steps))

    def _turn(self, grid: Grid) -> int:
        """The inner point whose sigma / alpha is nearest to ``low``, as in the authors' code."""
        inner = grid.sigma[1:-1] / grid.alpha[1:-1]
        return 1 + int(np.argmin(np.abs(inner - self.low)))

    def _interval(self, grid: Grid, turn: int) -> Grid:
        """The grid of one further descent, which ends exactly on the point turned at."""
        lam = grid.finite_half_log_snr
        bottom = lam[turn]
        top = max(-np.log(self.high), lam[0])
        if top >= bottom:
            top = lam[turn - 1]
        first, last = np.exp(-np.array([top, bottom]) / RHO)
        ratio = np.linspace(first, last, self._descent(grid.steps) + 1) ** RHO
        t = grid.schedule.time_of_half_log_snr(-np.log(ratio))
        alpha, sigma = grid.schedule.level(t)
        t[-1], alpha[-1], sigma[-1] = grid.t[turn], grid.alpha[turn], grid.sigma[turn]
        return Grid(grid.schedule, t, alpha, sigma)

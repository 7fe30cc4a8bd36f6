"""Heun's second-order method."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from samplers.churn import ChurnedSampler
from samplers.first_order import first_order
from samplers.linear_multistep import Line
from samplers.plan import Columns, Plan

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class Heun(ChurnedSampler, frozen=True):
    """Heun's method: an Euler step, then the mean of the slopes at both ends.

    Second order, two evaluations a step (one in the last step to the clean picture). It integrates
    along the schedule's own line: ``x / alpha`` as a function of ``sigma / alpha``, or ``x`` as a
    function of ``sigma`` on flow-matching models. With ``s_churn`` it is EDM's stochastic sampler.
    """

    summary: ClassVar[str] = (
        "Second order with two evaluations per step; needs many steps when guided. s_churn adds"
        " noise."
    )
    source: ClassVar[str] = "Karras et al., arXiv 2206.00364, algorithms 1 and 2."
    name: Literal["heun"] = "heun"

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else 2

    @override
    def plain_plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base", "slope")
        x, base, slope, D = columns["x"], columns["base"], columns["slope"], columns.denoised
        tables: list[F64] = []
        points: list[int] = []
        step: list[int] = []
        line = Line.of_schedule(grid)
        for i in range(grid.steps):
            euler = first_order(grid, i, x, D)
            tables.append(columns.table(x=euler, base=x, slope=line.slope(i, columns)))
            points.append(i)
            step.append(i)
            if grid.sigma[i + 1] == 0:
                continue
            mean = 0.5 * (slope + line.slope(i + 1, columns))
            landed = line.scale[i + 1] / line.scale[i] * base + line.reach(i) * mean
            tables.append(columns.table(x=landed))
            points.append(i + 1)
            step.append(i)
        points.append(grid.steps)
        return Plan(
            grid.t[points],
            grid.alpha[points],
            grid.sigma[points],
            np.stack(tables),
            tuple(step),
            grid.start_scale,
        )

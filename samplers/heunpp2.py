"""Heun++: a mean of the slopes at up to three levels, weighted by their noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from samplers.first_order import first_order
from samplers.linear_multistep import Line
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class HeunPP2(Sampler, frozen=True):
    """Heun++ 2: a step along a weighted mean of the slopes at three levels.

    Two Euler steps look ahead to the next level and the one after it. The weight of each slope
    found there is its level's noise divided by three times the noise at the start of the run; the
    slope at the start of the step has the remaining weight. The method therefore approaches Euler's
    as the noise falls: first order. Three evaluations a step, two in the last but one (where the
    noise is divided by twice the initial noise) and one in the last. It integrates along the
    schedule's own line, as ``heun`` does.
    """

    summary: ClassVar[str] = "Looks two levels ahead, less and less as noise falls; first order."
    source: ClassVar[str] = "Carzit, sd-webui-samplers-scheduler; ComfyUI and Forge."
    name: Literal["heunpp2"] = "heunpp2"

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 3

    @property
    @override
    def convergence_order(self) -> int:
        return 1

    @override
    def evaluations(self, steps: int) -> int:
        return max(3 * (steps - 1), 1)

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base", "slope", "ahead")
        x, base, slope, ahead = (columns[name] for name in ("x", "base", "slope", "ahead"))
        line = Line.of_schedule(grid)
        tables: list[F64] = []
        points: list[int] = []
        step: list[int] = []
        for i in range(grid.steps):
            # Near the end there are fewer than two further levels.
            seen = min(3, grid.steps - i)
            weights = line.s[i + 1 : i + seen] / (seen * line.s[0])
            euler = first_order(grid, i, x, columns.denoised)
            tables.append(columns.table(x=euler, base=x, slope=line.slope(i, columns)))
            for j in range(i + 1, i + seen):
                here = line.slope(j, columns)
                # Written with differences, so that the weights need not sum to one.
                turn = weights[j - i - 1] * (here - slope)
                if j + 1 < i + seen:
                    on = first_order(grid, j, x, columns.denoised)
                    tables.append(columns.table(x=on, base=base, slope=slope, ahead=turn))
                    continue
                turn = turn + ahead if seen == 3 else turn
                landed = self._euler(line, i, base, slope) + line.reach(i) * turn
                tables.append(columns.table(x=landed))
            points += range(i, i + seen)
            step += [i] * seen
        points.append(grid.steps)
        return Plan(
            grid.t[points],
            grid.alpha[points],
            grid.sigma[points],
            np.stack(tables),
            tuple(step),
            grid.start_scale,
        )

    def _euler(self, line: Line, i: int, base: F64, slope: F64) -> F64:
        return line.scale[i + 1] / line.scale[i] * base + line.reach(i) * slope

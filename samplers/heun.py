"""Heun's second-order method."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from samplers.first_order import first_order
from samplers.noise_schedule import FlowMatching
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class Heun(Sampler, frozen=True):
    """Heun's method: an Euler step, then the mean of the slopes at both ends.

    Second order, two evaluations a step (one in the last step to the clean picture). Works in
    ``x / alpha`` over ``sigma / alpha``, and on flow-matching models in ``x`` over ``sigma``.
    """

    summary: ClassVar[str] = "Second order, two evaluations a step; steady at low noise."
    source: ClassVar[str] = "Karras et al., arXiv 2206.00364, algorithm 1."
    name: Literal["heun"] = "heun"

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2

    @property
    @override
    def convergence_order(self) -> int:
        return 2

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base", "slope")
        x, base, slope, D = columns["x"], columns["base"], columns["slope"], columns.denoised
        tables: list[F64] = []
        points: list[int] = []
        step: list[int] = []
        scale = np.ones_like(grid.alpha) if _is_flow(grid) else grid.alpha
        for i in range(grid.steps):
            euler = first_order(grid, i, x, D)
            last = grid.sigma[i + 1] == 0
            here = _slope(grid, i, x, D)
            tables.append(columns.table(x=euler, base=x, slope=here))
            points.append(i)
            step.append(i)
            if last:
                continue
            there = _slope(grid, i + 1, x, D)
            reach = grid.sigma[i + 1] / scale[i + 1] - grid.sigma[i] / scale[i]
            moved = base / scale[i] + 0.5 * reach * (slope + there)
            tables.append(columns.table(x=scale[i + 1] * moved))
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


def _is_flow(grid: Grid) -> bool:
    return isinstance(grid.schedule, FlowMatching)


def _slope(grid: Grid, i: int, x: F64, denoised: F64) -> F64:
    if _is_flow(grid):
        return (x - denoised) / grid.sigma[i]
    return (x - grid.alpha[i] * denoised) / grid.sigma[i]

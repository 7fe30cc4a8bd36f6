"""Euler's method with a slope extrapolated away from the previous one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from samplers.linear_multistep import Line
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class GradientEstimation(Sampler, frozen=True):
    """Euler steps along ``gamma slope + (1 - gamma) previous slope``.

    Permenter and Yuan, arXiv 2306.04848. One evaluation a step, first order. With ``gamma`` 1 it is
    Euler's method; with 1.5 and even steps it is second-order Adams-Bashforth. History: one slope.
    The first step is Euler's, and the last one lands on the denoised prediction.
    """

    summary: ClassVar[str] = (
        "Euler's method, extrapolated away from the previous slope; for few steps."
    )
    source: ClassVar[str] = "Permenter and Yuan, arXiv 2306.04848, algorithm 2; ComfyUI."
    name: Literal["gradient_estimation"] = "gradient_estimation"
    gamma: float = Field(
        default=2.0,
        ge=1,
        le=3,
        description="Weight of the current slope; the previous slope has 1 minus this weight.",
    )

    @property
    @override
    def convergence_order(self) -> int:
        return 1

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "before")
        line = Line.of_schedule(grid)
        tables: list[F64] = []
        for i in range(grid.steps):
            slope = line.slope(i, columns)
            mean = slope
            if i > 0 and grid.sigma[i + 1] > 0:
                [before] = line.recalled(i, columns, ["before"])
                mean = self.gamma * slope + (1 - self.gamma) * before
            x = line.step(i, columns, mean)
            tables.append(columns.table(x=x, **line.kept(i + 1, x, [slope], ["before"])))
        return Plan.of_steps(grid, tables)

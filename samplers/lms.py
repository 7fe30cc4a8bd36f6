"""LMS: Adams-Bashforth over the noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from samplers.linear_multistep import Line, combined
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class LMS(Sampler, frozen=True):
    """The linear multistep method of k-diffusion: integrates a polynomial through the last slopes.

    One evaluation a step. History: up to three slopes. The first steps are of lower order, an error
    that shows only from about a hundred steps on; ``hb`` with ``beta`` 1 and variable weights
    repeats them once the slopes are known. It integrates along the schedule's own line, as ``heun``
    does. Four slopes overshoot where a guided prediction turns fast, as do the high orders of
    ``hb``; with guidance and few steps, use order 2.
    """

    summary: ClassVar[str] = "Adams-Bashforth: the polynomial through the last slopes."
    source: ClassVar[str] = (
        "Hairer, Norsett and Wanner, Solving ODEs I, III.5; k-diffusion, sample_lms."
    )
    name: Literal["lms"] = "lms"
    order: Literal[2, 3, 4] = Field(default=4, description="Number of slopes that a step uses.")

    @property
    @override
    def convergence_order(self) -> int:
        return self.order

    @override
    def plan(self, grid: Grid) -> Plan:
        slots = tuple(f"slope{k}" for k in range(1, self.order))
        columns = Columns("x", *slots)
        line = Line.of_schedule(grid)
        tables: list[F64] = []
        for i in range(grid.steps):
            slopes = [line.slope(i, columns), *line.recalled(i, columns, slots[:i])]
            mean = combined(line.mean_weights(i, len(slopes), "variable"), slopes)
            x = line.step(i, columns, mean)
            tables.append(columns.table(x=x, **line.kept(i + 1, x, slopes, slots)))
        return Plan.of_steps(grid, tables)

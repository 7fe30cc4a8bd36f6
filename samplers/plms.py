"""PLMS: the linear multistep sampler of pseudo numerical methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from samplers.linear_multistep import Line, combined
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

ORDER = 4


class PLMS(Sampler, frozen=True):
    """Pseudo linear multistep (Liu et al., arXiv 2202.09778), as Stable Diffusion shipped with it.

    Adams-Bashforth of order 4 with the weights of even steps, on eps, or on the velocity for flow
    matching. The first step is made twice, the second time with the mean of the slopes at both of
    its ends, so a run takes one evaluation more than it has steps; orders 2 and 3 follow. History:
    three slopes. As grids are uneven in sigma / alpha, it converges with the second power of the
    step.

    diffusers' ``PNDMScheduler`` with ``skip_prk_steps`` equals this sampler with the spacing
    ``leading``, and with ``trailing`` if the number of steps divides 1000: it finds the next level
    by counting back a fixed stride.
    """

    summary: ClassVar[str] = (
        "Stable Diffusion's first sampler; one evaluation more than there are steps."
    )
    source: ClassVar[str] = "Liu et al., arXiv 2202.09778, equation 12 and appendix."
    name: Literal["plms"] = "plms"

    @property
    @override
    def convergence_order(self) -> int:
        return 2

    @override
    def evaluations(self, steps: int) -> int:
        return steps + int(steps > 1)

    @override
    def plan(self, grid: Grid) -> Plan:
        grid = grid.landed()
        line = Line.of_schedule(grid)
        slots = tuple(f"slope{k}" for k in range(1, ORDER))
        columns = Columns("x", *slots)
        points, step = list(range(grid.steps + 1)), list(range(grid.steps))
        tables: list[F64] = []
        for i in range(grid.steps):
            slopes = [line.slope(i, columns), *line.recalled(i, columns, slots[:i])]
            weights = line.mean_weights(i, min(ORDER, i + 1), "constant")
            x = line.step(i, columns, combined(weights, slopes))
            tables.append(columns.table(x=x, **line.kept(i + 1, x, slopes, slots)))
            if i == 0 and grid.steps > 1:
                tables.append(_first_step_again(line, columns, slots))
                points.insert(1, 1)
                step.insert(0, 0)
        return Plan(
            grid.t[points],
            grid.alpha[points],
            grid.sigma[points],
            np.stack(tables),
            tuple(step),
            grid.start_scale,
        )


def _first_step_again(line: Line, columns: Columns, slots: tuple[str, ...]) -> F64:
    """The stage at point 1 that repeats the first step with the mean of the slopes at both ends.

    It is expressed as a change of x, so that what guidance changed in x is preserved.
    """
    there, here = line.slope(1, columns), line.recalled(1, columns, slots[:1])[0]
    x = columns["x"] + 0.5 * line.reach(0) * (there - here)
    return columns.table(x=x, **line.kept(1, x, [here], slots))

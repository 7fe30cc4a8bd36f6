"""The midpoint method in log sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.churn import ChurnedSampler
from samplers.first_order import first_order
from samplers.linear_multistep import Line
from samplers.plan import Columns, Plan

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class DPM2(ChurnedSampler, frozen=True):
    """DPM-Solver-2 as the midpoint method: a step along the slope at its middle in log sigma.

    Second order, two evaluations a step (one in the last step to the clean picture and, with
    ``eta`` 1, in a step from pure noise). It integrates along the schedule's own line, as ``heun``
    does. With ``eta`` above 0 a step lands below the next level and adds fresh noise to reach it;
    this is "DPM2 a". ``s_churn`` instead raises the noise before a step.
    """

    summary: ClassVar[str] = "Second order: the slope at the middle of each step; two evaluations."
    source: ClassVar[str] = "k-diffusion, sample_dpm_2 and sample_dpm_2_ancestral."
    name: Literal["dpm_2"] = "dpm_2"
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 is ancestral sampling.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else 2

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0 or super().stochastic

    @override
    def plain_plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base")
        x, base, D = columns["x"], columns["base"], columns.denoised
        line = Line.of_schedule(grid)
        tables: list[F64] = []
        points: list[_Point] = []
        step: list[int] = []
        for i in range(grid.steps):
            here = _Point(grid.t[i], grid.alpha[i], grid.sigma[i], line.scale[i], line.s[i])
            points.append(here)
            step.append(i)
            kept = self._kept(grid, i)
            fresh = float(np.sqrt(max(grid.sigma[i + 1] ** 2 - kept**2, 0)))
            if kept == 0:
                # The flow is followed to the clean picture, where log sigma is infinite and a step
                # has no middle. This is the last step or, at eta 1, a step from pure noise.
                clean = first_order(grid, i, x, D, sigma_next=0)
                tables.append(columns.table(x=clean + fresh * columns.noise))
                continue
            below = self._landing(grid, line, i, kept)
            middle = _middle(grid, here, below)
            half = (middle.sigma / here.sigma) * x
            half = half + (middle.alpha - here.alpha * middle.sigma / here.sigma) * D
            tables.append(columns.table(x=half, base=x))
            points.append(middle)
            step.append(i)
            slope = (x - middle.scale * D) / middle.sigma
            landed = below.scale / here.scale * base + below.scale * (below.s - here.s) * slope
            landed = grid.alpha[i + 1] / below.alpha * landed
            tables.append(columns.table(x=landed + fresh * columns.noise))
        t, alpha, sigma = (
            np.array([*(getattr(point, name) for point in points), getattr(grid, name)[-1]])
            for name in ("t", "alpha", "sigma")
        )
        return Plan(t, alpha, sigma, np.stack(tables), tuple(step), grid.start_scale)

    def _kept(self, grid: Grid, i: int) -> float:
        """Sigma of the level down to which step i follows the flow, before it adds fresh noise."""
        j = i + 1
        shrink = grid.alpha[i] * grid.sigma[j] / (grid.alpha[j] * grid.sigma[i])
        return float(grid.sigma[j] * np.sqrt(1 - self.eta**2 * max(1 - shrink**2, 0)))

    def _landing(self, grid: Grid, line: Line, i: int, kept: float) -> _Point:
        """The point where the flow of step i ends: the next point, or one with less noise."""
        j = i + 1
        if not self.eta:
            return _Point(grid.t[j], grid.alpha[j], grid.sigma[j], line.scale[j], line.s[j])
        # It may lie below all trained levels, as nothing is evaluated there.
        level = grid.schedule.level_of_half_log_snr(np.log(grid.alpha[j] / kept))
        return _of(grid, grid.t[j], *level)


class _Point(NamedTuple):
    t: float
    alpha: float
    sigma: float
    scale: float
    s: float


def _middle(grid: Grid, start: _Point, end: _Point) -> _Point:
    """The midpoint of two points in log sigma, on the schedule's own line."""
    # Line.s is what schedules call the noise level.
    return _at(grid, grid.schedule.time_of_noise_level(np.sqrt(np.array(start.s * end.s))))


def _at(grid: Grid, t: F64) -> _Point:
    """The point at a time, whose levels are read back, as the schedule may have clipped it."""
    return _of(grid, float(t), *grid.schedule.level(t))


def _of(grid: Grid, t: float, alpha: F64, sigma: F64) -> _Point:
    scale = grid.schedule.line_scale(alpha)
    return _Point(t, float(alpha), float(sigma), float(scale), float(sigma / scale))

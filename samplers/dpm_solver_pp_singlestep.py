"""Singlestep DPM-Solver++: further evaluations inside each step, and no history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers.grid import Grid
    from samplers.levels import F64


class DPMSolverPPSinglestep(Sampler, frozen=True):
    """DPM-Solver++ singlestep (Lu et al., arXiv 2211.01095, algorithm 1; 3S as in their code).

    Order 2 or 3 with as many evaluations a step, at points spaced evenly in log SNR within the
    step, and one evaluation in the last step to the clean picture. No history, so it starts at
    full order. Order 2 is commonly called "DPM++ 2S"; with ``eta`` 1 it is "DPM++ 2S a", which
    lands below the next level and adds fresh noise to reach it (k-diffusion,
    sample_dpmpp_2s_ancestral).

    Order 3 with ``midpoint`` uses only the second of the two inner points in its correction, as
    the authors do by default; diffusers takes another weight in the step to that point, and agrees
    for ``taylor``.
    """

    summary: ClassVar[str] = (
        "DPM++ 2S, 2S a and 3S: full order from the first step, without history."
    )
    source: ClassVar[str] = "Lu et al., arXiv 2211.01095, algorithm 1; k-diffusion for eta."
    name: Literal["dpm_solver_pp_singlestep"] = "dpm_solver_pp_singlestep"
    order: Literal[2, 3] = Field(
        default=2, description="Order, which is also the number of evaluations per step."
    )
    solver_type: Literal["midpoint", "taylor"] = Field(
        default="midpoint",
        description="Form of the higher-order term; taylor is called heun in diffusers.",
    )
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 is ancestral sampling.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return self.order

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else self.order

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        names = ("D0", "D1")[: self.order - 1]
        columns = Columns("x", *names)
        held = [columns[name] for name in names]
        tables: list[F64] = []
        points: list[_Level] = []
        step: list[int] = []
        for i in range(grid.steps):
            levels, fresh = self._levels(grid, i)
            evaluations = len(levels) - 1
            for k in range(evaluations):
                known = [*held[:k], columns.denoised]
                # Replace the terms so far by those with the new prediction. Starting from x, and
                # not from the stored start of the step, preserves what guidance or inpainting
                # changed in x.
                x = columns["x"] - self._terms(levels[: k + 1], held[:k])
                x = levels[k + 1].sigma / levels[k].sigma * x
                x = x + self._terms(levels[: k + 2], known)
                if k + 1 == evaluations:
                    tables.append(columns.table(x=x + fresh * columns.noise))
                else:
                    tables.append(columns.table(x=x, **dict(zip(names, known, strict=False))))
                points.append(levels[k])
                step.append(i)
        t, alpha, sigma = (
            np.array([*(getattr(point, name) for point in points), getattr(grid, name)[-1]])
            for name in ("t", "alpha", "sigma")
        )
        return Plan(t, alpha, sigma, np.stack(tables), tuple(step), grid.start_scale)

    def _levels(self, grid: Grid, i: int) -> tuple[list[_Level], float]:
        """Where step i starts, evaluates and lands, and the deviation of its fresh noise."""
        lam = grid.finite_half_log_snr
        start = _Level(grid.t[i], grid.alpha[i], grid.sigma[i], lam[i])
        alpha, sigma = grid.alpha[i + 1], grid.sigma[i + 1]
        if sigma == 0:
            return [start, _Level(grid.t[i + 1], alpha, sigma, lam[i + 1])], 0.0
        h = lam[i + 1] - lam[i]
        fresh = self.eta * sigma * np.sqrt(-np.expm1(-2 * h))
        # sqrt(sigma^2 - fresh^2), in a form that does not cancel in a long step.
        kept = sigma * np.sqrt(1 - self.eta**2 + (self.eta * np.exp(-h)) ** 2)
        end = _Level(grid.t[i + 1], alpha, kept, np.log(alpha) - np.log(kept))
        times = grid.schedule.time_of_half_log_snr(
            np.linspace(start.half_log_snr, end.half_log_snr, self.order + 1)[1:-1]
        )
        # Levels are read back from the times, which the schedule may have clipped.
        inner = zip(
            times, *grid.schedule.level(times), grid.schedule.half_log_snr(times), strict=True
        )
        return [start, *(_Level(*values) for values in inner), end], float(fresh)

    def _terms(self, levels: Sequence[_Level], known: Sequence[F64]) -> F64 | float:
        """The contribution of the predictions to x at the last of these levels."""
        if not known:
            return 0.0
        start, end = levels[0], levels[-1]
        total = end.alpha - start.alpha * end.sigma / start.sigma
        first = total * known[0]
        if len(known) == 1:
            return first
        h = end.half_log_snr - start.half_log_snr
        r1 = (levels[1].half_log_snr - start.half_log_snr) / h
        difference = (known[1] - known[0]) / r1
        if self.order == 2 and self.solver_type == "midpoint":
            return first + 0.5 * total * difference
        slope = end.alpha * (1 + np.expm1(-h) / h)
        if len(known) == 2:
            return first + slope * difference
        r2 = (levels[2].half_log_snr - start.half_log_snr) / h
        wider = (known[2] - known[0]) / r2
        if self.solver_type == "midpoint":
            return first + slope * wider
        derivative = (r2 * difference - r1 * wider) / (r2 - r1)
        bend = 2 * (wider - difference) / (r2 - r1)
        return first + slope * derivative - end.alpha * ((np.expm1(-h) + h) / h**2 - 0.5) * bend


@dataclass(frozen=True, slots=True)
class _Level:
    t: float
    alpha: float
    sigma: float
    half_log_snr: float

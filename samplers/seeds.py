"""SEEDS: exponential Runge-Kutta steps of the reverse SDE, with exact noise within a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers.grid import Grid
    from samplers.levels import F64

POINTS: Final = {
    "midpoint": (0.0, 1 / 2),
    "taylor": (0.0, 1 / 2),
    "heun": (0.0, 1.0),
    "three": (0.0, 1 / 3, 2 / 3),
}
"""Where each method evaluates, as fractions of a step in log SNR."""


class SEEDS(Sampler, frozen=True):
    """SEEDS-2 and SEEDS-3 in the denoised prediction (Gonzalez et al., arXiv 2305.14267).

    Two or three evaluations a step, and one in the last step to the clean picture. Solves the SDE
    whose noise is ``eta`` times that of the reverse diffusion. The noise at the points within a
    step belongs to one path, with its exact covariance.

    ComfyUI's seeds_2 is ``midpoint`` and its seeds_3 is ``three``; its exp_heun_2_x0_sde is
    ``heun``, and exp_heun_2_x0 is ``heun`` with ``eta`` 0. With ``eta`` 0, ``midpoint`` and
    ``taylor`` equal ``dpm_solver_pp_singlestep`` of order 2, and ``three`` that of order 3.
    """

    summary: ClassVar[str] = "Exponential Runge-Kutta steps of the reverse SDE; few steps."
    source: ClassVar[str] = "Gonzalez et al., arXiv 2305.14267, algorithms 2 and 3; ComfyUI."
    name: Literal["seeds"] = "seeds"
    method: Literal["midpoint", "taylor", "heun", "three"] = Field(
        default="midpoint",
        description=(
            "midpoint and taylor evaluate at a step's middle and differ in its weight, heun at its "
            "end, three at its thirds."
        ),
    )
    eta: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 the reverse diffusion's.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return len(POINTS[self.method])

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else len(POINTS[self.method])

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base", "path", "D0", "D1")
        tables: list[F64] = []
        points: list[_Level] = []
        step: list[int] = []
        for i in range(grid.steps):
            levels = self._levels(grid, i)
            evaluations = len(levels) - 1
            for k in range(evaluations):
                start = columns["x"] if k == 0 else columns["base"]
                # The path's noise in units of sigma: the old noise decays, and new noise restores
                # unit variance.
                faded = self._faded(levels[k], levels[k + 1])
                path = np.sqrt(1 - faded**2) * columns.noise
                path = path if k == 0 else faded * columns["path"] + path
                known = [*(columns[f"D{j}"] for j in range(k)), columns.denoised]
                shrink = (
                    levels[k + 1].sigma / levels[0].sigma * self._faded(levels[0], levels[k + 1])
                )
                total = levels[k + 1].alpha - levels[0].alpha * shrink
                x = shrink * start + self._terms(levels[: k + 2], known, total)
                x = x + levels[k + 1].sigma * path
                held: dict[str, F64] = {}
                if k + 1 < evaluations:
                    held = {"base": start, "path": path, f"D{k}": columns.denoised}
                    held |= {f"D{j}": columns[f"D{j}"] for j in range(k)}
                tables.append(columns.table(x=x, **held))
                points.append(levels[k])
                step.append(i)
        points.append(_Level(grid.t[-1], grid.alpha[-1], grid.sigma[-1], np.inf))
        t, alpha, sigma, _ = np.array(points).T
        return Plan(t, alpha, sigma, np.stack(tables), tuple(step), grid.start_scale)

    def _levels(self, grid: Grid, i: int) -> list[_Level]:
        """Where step i evaluates, and where it lands."""
        lam = grid.finite_half_log_snr
        start, end = (_Level(grid.t[j], grid.alpha[j], grid.sigma[j], lam[j]) for j in (i, i + 1))
        if end.sigma == 0:
            return [start, end]
        shares = np.array(POINTS[self.method][1:])
        if shares[-1] == 1:
            return [start, end, end]
        times = grid.schedule.time_of_half_log_snr(lam[i] + shares * (lam[i + 1] - lam[i]))
        # Levels are read back from the times, which the schedule may have clipped.
        inner = zip(
            times, *grid.schedule.level(times), grid.schedule.half_log_snr(times), strict=True
        )
        return [start, *(_Level(*values) for values in inner), end]

    def _faded(self, start: _Level, end: _Level) -> float:
        """The decay factor of noise between two levels: ``e^(-eta h)``, 0 from pure noise."""
        shrink = end.sigma * start.alpha / (start.sigma * end.alpha)
        return float(shrink**self.eta)

    def _terms(self, levels: Sequence[_Level], known: Sequence[F64], total: float) -> F64:
        """The contribution of the predictions to x at the last of these levels.

        Args:
            levels: the levels evaluated so far in the step, and the one to go to.
            known: the predictions at the levels evaluated.
            total: the contribution of a constant prediction of 1.
        """
        first = total * known[0]
        if len(known) == 1:
            return first
        lam, end = levels[0].half_log_snr, levels[-1]
        newest = levels[len(known) - 1]
        h = end.half_log_snr - lam
        share = (newest.half_log_snr - lam) / h
        difference = (known[-1] - known[0]) / share
        if self.method == "midpoint":
            return first + 0.5 * total * difference
        z = (1 + self.eta) * h
        return first + end.alpha * (1 + np.expm1(-z) / z) * difference


class _Level(NamedTuple):
    t: float
    alpha: float
    sigma: float
    half_log_snr: float

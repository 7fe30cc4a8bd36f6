"""DPM-Solver-fast: single steps of orders 1 to 3 that share a budget of evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samplers.grid import Grid
    from samplers.levels import F64

INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
"""Where a step of each order evaluates after its start, as fractions of its log-SNR length."""


class DPMFast(Sampler, frozen=True):
    """DPM-Solver-fast (Lu et al., arXiv 2206.00927, section 3.4; k-diffusion, sample_dpm_fast).

    A run over a grid of N steps takes N evaluations in all. It makes long single steps of order 3
    in the noise prediction, and the last ones are of lower order so that the budget is met. The
    ends of these steps are placed evenly by index along the levels of the grid. A step to the
    clean picture, where log SNR is infinite, takes one evaluation. No history. With ``eta`` above
    0 a step lands below the next level, but not below the last one, and adds fresh noise to reach
    the next level.

    Departures from the source: levels follow the spacing, whereas k-diffusion's are even in log
    SNR whatever the schedule; and a run to the clean picture evaluates at its cleanest level,
    where k-diffusion's run ends.
    """

    summary: ClassVar[str] = (
        "Long single steps of order 3 in the noise prediction; needs many evaluations."
    )
    source: ClassVar[str] = (
        "Lu et al., arXiv 2206.00927, section 3.4; k-diffusion, sample_dpm_fast."
    )
    default_spacing: ClassVar[str] = "logsnr"
    name: Literal["dpm_fast"] = "dpm_fast"
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 is ancestral sampling.",
    )

    @property
    @override
    def convergence_order(self) -> int:
        """2: the last step may be of order 1, whose error is of the second power of its length."""
        return 0 if self.stochastic else 2

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 3

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0

    @override
    def steps_taken(self, steps: int) -> int:
        return len(_orders(steps - 1)) + 1

    @override
    def evaluations(self, steps: int) -> int:
        return steps

    @override
    def evaluations_of_full_steps(self, steps: int) -> int:
        return steps

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "D0", "bend")
        to_clean = grid.sigma[-1] == 0
        last = grid.steps - to_clean
        orders = _orders(last)
        ends = list(_even(grid, last, len(orders)))
        tables: list[F64] = []
        points: list[_Level] = []
        step: list[int] = []
        for i, order in enumerate(orders):
            levels, fresh = self._levels(grid, ends[i], ends[i + 1], ends[-1], order)
            made = _single_step(levels, columns)
            made[-1] = made[-1] + fresh * columns.table(x=columns.noise)
            tables += made
            points += levels[:-1]
            step += [i] * order
        points.append(ends[-1])
        if to_clean:
            tables.append(columns.table(x=columns.denoised))
            points.append(_Level(grid.t[-1], grid.alpha[-1], grid.sigma[-1], np.inf))
            step.append(len(orders))
        t, alpha, sigma = (
            np.array([getattr(point, name) for point in points]) for name in ("t", "alpha", "sigma")
        )
        return Plan(t, alpha, sigma, np.stack(tables), tuple(step), grid.start_scale)

    def _levels(
        self, grid: Grid, start: _Level, end: _Level, last: _Level, order: int
    ) -> tuple[list[_Level], float]:
        """Where a step starts, evaluates and lands, and the deviation of its fresh noise."""
        lam = end.half_log_snr
        shrink = np.exp(start.half_log_snr - lam)
        # Down to ``kept`` times the sigma of the next level, but not below the end of the run.
        kept = np.sqrt(1 - self.eta**2 * (1 - shrink**2))
        kept = max(kept, np.exp(lam - last.half_log_snr))
        fresh = end.sigma * np.sqrt(max(1 - kept**2, 0))
        below = _Level(end.t, end.alpha, kept * end.sigma, lam - np.log(kept))
        h = below.half_log_snr - start.half_log_snr
        inner = [_level(grid, start.half_log_snr + share * h) for share in INNER[order]]
        return [start, *inner, below], float(fresh)


@dataclass(frozen=True, slots=True)
class _Level:
    t: float
    alpha: float
    sigma: float
    half_log_snr: float


def _level(grid: Grid, half_log_snr: float) -> _Level:
    """The level at a half-log-SNR, read back from its time, which the schedule may clip."""
    t = grid.schedule.time_of_half_log_snr(np.array(half_log_snr))
    alpha, sigma = grid.schedule.level(t)
    return _Level(float(t), float(alpha), float(sigma), float(grid.schedule.half_log_snr(t)))


def _orders(evaluations: int) -> list[int]:
    """Orders of the steps that take this many evaluations in all (Lu et al., section 3.4)."""
    threes, left = divmod(evaluations, 3)
    if left:
        return [3] * threes + [left]
    return [3] * (threes - 1) + [2, 1] if threes else []


def _even(grid: Grid, last: int, steps: int) -> Iterator[_Level]:
    """The ends of ``steps`` steps down to point ``last`` of the grid, placed evenly by index."""
    lam = grid.finite_half_log_snr
    places = np.linspace(0, last, steps + 1)
    for place in places.tolist():
        if place.is_integer():
            i = int(place)
            yield _Level(grid.t[i], grid.alpha[i], grid.sigma[i], lam[i])
        else:
            yield _level(grid, float(np.interp(place, np.arange(last + 1), lam[: last + 1])))


def _single_step(levels: list[_Level], columns: Columns) -> list[F64]:
    """The tables of one step over its start, its inner points and its end.

    With eps_k the noise prediction at point k, x at the next point is the first-order step from
    the start plus a multiple of ``eps_k - eps_0``, which is kept as ``bend``. Everything is
    expressed in the current x and in denoised predictions, so that a change that guidance or
    inpainting made to x is preserved.
    """
    x, D0, D = columns["x"], columns["D0"], columns.denoised
    start = levels[0]
    tables = [columns.table(x=_held(start, levels[1], x, D), D0=D)]
    straight = x
    for here, to in pairwise(levels[1:]):
        turned = (x - straight + here.alpha * (D0 - D)) / here.sigma
        reach = to.half_log_snr - start.half_log_snr
        share = (here.half_log_snr - start.half_log_snr) / reach
        gain = np.expm1(reach) / 2 if len(levels) == 3 else np.expm1(reach) / reach - 1
        bend = -to.sigma * gain / share * turned
        tables.append(columns.table(x=_held(here, to, straight, D0) + bend, D0=D0, bend=bend))
        straight = x - columns["bend"]
    return tables


def _held(here: _Level, to: _Level, x: F64, denoised: F64) -> F64:
    """The first-order step with constant prediction, see :mod:`samplers.first_order`."""
    ratio = to.sigma / here.sigma
    return ratio * x + (to.alpha - here.alpha * ratio) * denoised

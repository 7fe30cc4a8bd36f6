"""DPM-Solver-v3: an exponential integrator that uses statistics of its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nextafter
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.first_order import first_order
from samplers.plan import Columns, Plan
from samplers.plan_error import PlanError
from samplers.sampler import FittedSampler
from samplers.step_integrals import StepIntegrals, interpolated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from samplers.grid import Grid
    from samplers.levels import F64
    from samplers.statistics import Statistics

Derivatives = Literal["exact", "pseudo"]
Correction = Literal["none", "exact", "pseudo", "raised"]
Preset = Literal["best", "published"]

BEYOND = 1e-3
"""How far a level may lie outside the range of the statistics, in lam: room for rounding only."""


class Flags(NamedTuple):
    """How a run is integrated; see the fields of the same names of :class:`DPMSolverV3`."""

    order: Literal[1, 2, 3]
    predictor: Derivatives
    corrector: Correction
    lower_order_final: bool


BELOW_4, BELOW_5 = nextafter(4, 0), nextafter(5, 0)
PRESETS: dict[Preset, tuple[tuple[float, float, Flags], ...]] = {
    "best": (
        (BELOW_4, inf, Flags(2, "exact", "pseudo", lower_order_final=True)),
        (inf, inf, Flags(2, "exact", "none", lower_order_final=True)),
    ),
    "published": (
        (1, 5, Flags(3, "pseudo", "exact", lower_order_final=False)),
        (1, inf, Flags(3, "exact", "exact", lower_order_final=True)),
        (BELOW_5, inf, Flags(2, "exact", "pseudo", lower_order_final=True)),
        (inf, inf, Flags(2, "exact", "none", lower_order_final=True)),
    ),
}
"""Flags by (highest guidance scale, largest number of steps); the first row that fits is used.

best: the most accurate on the embedded model at 5 to 10 steps (docs/samplers.md), where order 3
with an exact corrector, the best on an anisotropic mixture, has 1.0 to 1.6 times the error.
published: those of the authors' scripts: for CIFAR-10 without guidance, for ImageNet and Stable
Diffusion at scales below 5, and for Stable Diffusion from 5.
"""


def preset(name: Preset, scale: float, steps: int) -> Flags:
    """The flags of a preset for a guidance scale and a number of steps."""
    rows = PRESETS[name]
    return next(flags for top, most, flags in rows if scale <= top and steps <= most)


class DPMSolverV3(FittedSampler, frozen=True):
    """DPM-Solver-v3 with empirical model statistics (Zheng et al., arXiv 2310.13268).

    Order 1 to 3, one evaluation a step; the corrector costs no evaluation. Fields left out are
    chosen by the guidance scale of the statistics and the number of steps.

    l, s and b are statistics of the model (:mod:`samplers.statistics`). The part of the noise
    prediction that is linear in x is integrated exactly, and so is the linear part of the change
    of the rest. Only what then remains, g, is approximated by finite differences. Without
    statistics (``statistics`` "none"), (l, s, b) = (1, 0, 0): order 1 is then DDIM, and order 2
    without corrector is DPM-Solver++ of order 2, solver_type taylor.

    With ``y = x / alpha``, D the denoised prediction and ``f = (1 - l) y - D``, a step from s to t
    is ``y_t = exp(-L) (y_s - E_0 f_s - C - sum_k M_k c_k)``, where c_k are the Taylor coefficients
    of g; the other symbols are defined in :mod:`samplers.step_integrals`. History holds alpha f,
    as the magnitude of f itself varies like exp(-lam). A correction subtracts the predictor's sum
    and adds one that also uses f at the point reached; f itself is not recomputed, as in the
    authors' code.

    **Changes of x from outside the solver.** Guidance (CFG++) and inpainting move x between steps
    and leave D unchanged. With D held, ``dy/dlam = D - y``, so such a displacement m shrinks
    exactly as sigma does. A step through f would instead scale it by ``exp(-L) (1 - (1 - l) E_0)``
    where ``exp(-h)`` is right, and the jump of (1 - l) m in f would be taken for a slope of g; both
    errors vanish only for l = 1. The state therefore has two points: z, which only the solver moves
    and from which f is computed, and x, where the model is evaluated. Their difference m = x - z
    is scaled with sigma, and enters f only through D.

    The last step to the clean picture is of first order, as is a step from pure noise, where l is
    taken as 1.
    """

    summary: ClassVar[str] = "Uses statistics of the model; the most accurate at 5 to 10 steps."
    source: ClassVar[str] = "Zheng et al., arXiv 2310.13268, equations 8 to 13, algorithms 1 and 2."
    name: Literal["dpm_solver_v3"] = "dpm_solver_v3"
    order: Literal[1, 2, 3] | None = Field(
        default=None, description="Order of the predictor; by default as in the preset."
    )
    predictor: Derivatives | None = Field(
        default=None,
        description=(
            "How the predictor estimates derivatives: exact solves for them; pseudo uses divided "
            "differences, which are more stable and of order 2 at most; by default as in the "
            "preset."
        ),
    )
    corrector: Correction | None = Field(
        default=None,
        description=(
            "Correct each point with the evaluation made there: none; exact, with the predictor's "
            "order; pseudo, one order higher by divided differences; raised, one order higher "
            "exactly; by default as in the preset."
        ),
    )
    lower_order_final: bool | None = Field(
        default=None,
        description="Lower the order of the last steps; by default as in the preset.",
    )
    preset: Preset = Field(
        default="best",
        description=(
            "How fields that are left out are chosen, given guidance scale and steps: the best "
            "known for this server, or as the authors published."
        ),
    )
    levels: Literal["asked", "statistics"] = Field(
        default="asked",
        description=(
            "Evaluate at the levels of the spacing (asked), or, like the authors, at the nearest "
            "points of the statistics."
        ),
    )

    @property
    @override
    def convergence_order(self) -> int:
        order, predictor, corrector, _ = self.flags(1.0, 1000)
        reached = order if predictor == "exact" else min(order, 2)
        # Every point but the last is corrected. A corrector adds at most one order to its
        # predictor's; a pseudo corrector reaches order 2 at most, as divided differences are wrong
        # from the second derivative on. The first step is of order one, and the correctors none and
        # exact leave it so. Its error is small at high noise, where a run starts, and shows only at
        # hundreds of steps.
        return {"none": reached, "exact": order, "pseudo": 2, "raised": reached + 1}[corrector]

    def flags(self, scale: float, steps: int) -> Flags:
        """The preset's flags, overridden by those fields that are set.

        Args:
            scale: guidance scale.
            steps: number of steps of the run.
        """
        chosen = preset(self.preset, scale, steps)
        own = {name: getattr(self, name) for name in Flags._fields}
        return chosen._replace(**{name: v for name, v in own.items() if v is not None})

    @override
    def plan(self, grid: Grid, statistics: Statistics | None = None) -> Plan:
        if not self.uses_statistics:
            if self.levels == "statistics":
                raise PlanError(
                    "sampler.levels",
                    "levels is 'statistics', and the field statistics is 'none'; "
                    "only 'asked' is allowed.",
                )
            return _plan(grid, self.flags(1.0, grid.steps), None)
        if statistics is None:
            raise PlanError(
                "sampler.statistics",
                f"statistics is {self.statistics!r}, but there are none for this model and "
                "guidance; compute them with `weft ems --model ... --guidance ... --scale ...`, or "
                "choose 'none'.",
            )
        if self.levels == "statistics":
            grid = _on_points(grid, statistics.half_log_snr)
        _refuse_levels_outside(grid, statistics.half_log_snr)
        scale = 1.0 if statistics.identity is None else statistics.identity.scale
        return _plan(grid, self.flags(scale, grid.steps), statistics)


def _plan(grid: Grid, flags: Flags, statistics: Statistics | None) -> Plan:
    run = _Run.over(grid, flags, statistics)
    shape = () if statistics is None else statistics.l.shape[1:]
    past = [f"F{k}" for k in range(1, run.depth + 1)]
    columns = Columns("x", *run.own_point, *past, latent_dims=len(shape))
    tables: list[F64] = []
    for i in range(grid.steps):
        x, D = columns["x"], columns.denoised
        if grid.sigma[i + 1] == 0:
            tables.append(columns.table(x=first_order(grid, i, x, D)))
            continue
        z = columns["z"] if run.own_point and i else x
        moved = x - z
        f = run.f(i, z, D)
        known = {
            i - k: columns[slot] / run.scale(i - k) for k, slot in enumerate(past[:i], start=1)
        }
        known[i] = f
        z = z + run.correction(i, known, columns.one)
        z = run.step(i, z, known, columns.one)
        kept = [run.scale(i) * f, *(columns[slot] for slot in past)]
        x = z + grid.sigma[i + 1] / grid.sigma[i] * moved
        own = dict.fromkeys(run.own_point, z)
        tables.append(columns.table(x=x, **own, **dict(zip(past, kept, strict=False))))
    # The step to the clean picture is the same for all elements.
    whole = (*tables[0].shape[:2], *shape)
    return Plan.of_steps(grid, [np.broadcast_to(table, whole) for table in tables])


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The numbers of one run, from which each step's weights of state and history follow.

    Attributes:
        grid: the points of the run.
        flags: how the run is integrated.
        lam: half-log-SNR of the points, with a finite stand-in for pure noise.
        statistics: statistics of the model; None for (l, s, b) = (1, 0, 0).
        l: the statistic l at each evaluation, ``[steps, ...]``.
        integrals: integrals over each step except one to the clean picture.
    """

    grid: Grid
    flags: Flags
    lam: F64
    statistics: Statistics | None
    l: F64  # noqa: E741 - the paper's name
    integrals: Sequence[StepIntegrals]

    @classmethod
    def over(cls, grid: Grid, flags: Flags, statistics: Statistics | None) -> _Run:
        lam = grid.finite_half_log_snr
        l = np.ones(grid.steps)  # noqa: E741
        if statistics is not None:
            l = interpolated(statistics.half_log_snr, statistics.l, lam[:-1])  # noqa: E741
        integrals: list[StepIntegrals] = []
        for i in np.flatnonzero(grid.sigma[1:]):
            if statistics is None or grid.alpha[i] == 0:
                integrals.append(StepIntegrals.plain(lam[i + 1] - lam[i]))
            else:
                integrals.append(StepIntegrals.of(statistics, lam[i], lam[i + 1]))
        return cls(grid, flags, lam, statistics, l, integrals)

    @property
    def own_point(self) -> tuple[str, ...]:
        """The slot of z, if any: without statistics, z is x itself."""
        return ("z",) if self.statistics is not None else ()

    @property
    def depth(self) -> int:
        """Number of past values of f that predictor and corrector use."""
        return self.flags.order - (self._corrector_order(self.flags.order) < 2)

    def scale(self, i: int) -> float:
        """The factor by which f is multiplied in history: alpha, or 1 where f is just -D."""
        return 1.0 if self._plain(i) else float(self.grid.alpha[i])

    def f(self, i: int, z: F64, denoised: F64) -> F64:
        """``f = (1 - l) z / alpha - D`` at point i."""
        return -denoised if self._plain(i) else (1 - self.l[i]) / self.grid.alpha[i] * z - denoised

    def step(self, i: int, z: F64, f: Mapping[int, F64], one: F64) -> F64:
        """The point z at i + 1, by the predictor (equation 9)."""
        alpha, to = self.grid.alpha[i], self.integrals[i]
        if self._plain(i):
            held = first_order(self.grid, i, z, -f[i])
        else:
            held = to.decay / alpha * z - to.moments[0] * f[i] - to.constant * one
            held = self.grid.alpha[i + 1] * held
        return held - self._change(i, self._predicted_from(i), self.flags.predictor, f, one)

    def correction(self, i: int, f: Mapping[int, F64], one: F64) -> F64:
        """The corrector's value of point i minus the predictor's (equation 12)."""
        arrived = self._predicted_from(i - 1) if i else []
        order = self._corrector_order(len(arrived) + 1)
        if i == 0 or order < 2:
            return 0 * one
        points = [i, *range(i - 2, i - order, -1)]
        derivatives = "pseudo" if self.flags.corrector == "pseudo" else "exact"
        predicted = self._change(i - 1, arrived, self.flags.predictor, f, one)
        return predicted - self._change(i - 1, points, derivatives, f, one)

    def _plain(self, i: int) -> bool:
        """Whether (l, s, b) is (1, 0, 0) on the step from point i."""
        return self.statistics is None or self.grid.alpha[i] == 0

    def _predicted_from(self, i: int) -> list[int]:
        """The past points that the predictor at point i uses."""
        left = self.grid.steps - i if self.flags.lower_order_final else self.flags.order
        order = min(self.flags.order, i + 1, left)
        return list(range(i - 1, i - order, -1))

    def _corrector_order(self, predictor_order: int) -> int:
        """Order of the corrector after a prediction of this order; below 2 nothing is corrected."""
        if self.flags.corrector == "none":
            return 0
        return predictor_order + (self.flags.corrector != "exact")

    def _change(
        self,
        s: int,
        points: Sequence[int],
        derivatives: Derivatives,
        f: Mapping[int, F64],
        one: F64,
    ) -> F64:
        """``alpha_t sum_k M_k c_k`` for the step from point s; c_k from g at s and ``points``."""
        if not points:
            return 0 * one
        r = self.lam[list(points)] - self.lam[s]
        moments = self.integrals[s].moments[1 : len(points) + 1]
        weights = np.tensordot(_taylor(r, derivatives).T, moments, 1)
        total = -weights.sum(0) * f[s]
        for weight, j in zip(weights, points, strict=True):
            growth, drift = self._between(s, j)
            total = total + weight * (np.exp(-growth) * f[j] - drift * one)
        return self.grid.alpha[s + 1] * total

    def _between(self, s: int, j: int) -> tuple[F64, F64]:
        """S and the drift from point s to point j, which is the next point or an earlier one.

        ``g_j = exp(-S) f_j - drift`` is f at j, carried back to s along f' = s f + b (equation 7).
        """
        if j == s + 1:
            return self.integrals[s].growth, self.integrals[s].drift
        growth = drift = np.array(0.0)
        for step in reversed(self.integrals[j:s]):
            growth = growth - step.growth
            drift = drift - np.exp(-growth) * step.drift
        return growth, drift


def _taylor(r: F64, derivatives: Derivatives) -> F64:
    """The matrix that takes g at distances r minus g at 0 to the Taylor coefficients c_1, c_2, ...

    Exact solves for the polynomial through all points; pseudo takes the divided difference over
    the first k points as c_k (appendix B.1).
    """
    n = len(r)
    if derivatives == "exact":
        return np.linalg.inv(r[:, None] ** np.arange(1, n + 1))
    matrix = np.zeros((n, n))
    for k in range(n):
        apart = r[: k + 1, None] - r[: k + 1]
        np.fill_diagonal(apart, r[: k + 1])
        matrix[k, : k + 1] = 1 / apart.prod(1)
    return matrix


def _on_points(grid: Grid, points: F64) -> Grid:
    """The grid moved to the nearest points of the statistics, except where lam is infinite."""
    lam = grid.half_log_snr
    inner = np.isfinite(lam)
    nearest = points[np.abs(lam[inner, None] - points).argmin(1)]
    if np.any(np.diff(nearest) <= 0):
        raise PlanError(
            "steps",
            f"steps is {grid.steps}, which is too many for {len(points)} statistics, since two "
            "steps fall on the same point; choose fewer steps, or levels 'asked'.",
        )
    t, alpha, sigma = grid.t.copy(), grid.alpha.copy(), grid.sigma.copy()
    t[inner] = grid.schedule.time_of_half_log_snr(nearest)
    alpha[inner], sigma[inner] = grid.schedule.level(t[inner])
    return replace(grid, t=t, alpha=alpha, sigma=sigma)


def _refuse_levels_outside(grid: Grid, points: F64) -> None:
    lam = grid.half_log_snr
    lam = lam[np.isfinite(lam)]
    low, high = points[0], points[-1]
    if np.any((lam < low - BEYOND) | (lam > high + BEYOND)):
        raise PlanError(
            "spacing",
            f"spacing goes from {lam.min():.4g} to {lam.max():.4g} in half-log-SNR, but the "
            f"statistics only from {low:.4g} to {high:.4g}; choose a spacing within that range, or "
            "the sampler's statistics 'none'.",
        )

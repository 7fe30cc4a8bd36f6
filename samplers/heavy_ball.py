"""Momentum for linear multistep samplers: heavy ball, generalized heavy ball and Nesterov."""

from __future__ import annotations

from abc import abstractmethod
from math import ceil, isclose
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from samplers.linear_multistep import Line, Weights, combined, of_differences
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

MIN_BETA = 0.1
"""Smallest beta; below it a velocity remembers more steps than most runs have."""
MIN_VARIABLE_BETA = 0.8
"""Smallest beta with variable weights; below it the effect of the first steps on the velocity hides
the order of convergence up to 320 steps."""


class MomentumSampler(Sampler, frozen=True):
    """What the three samplers share: the parameters order and beta, and the integration loop.

    The order is a real number: 3.8 stands for r = 4 slopes a step with beta = 0.8, and 4 for r = 4
    with beta = 1, which is no momentum: Adams-Bashforth. ``{"order": 4, "beta": 0.8}`` means the
    same as ``{"order": 3.8}``.

    Constant weights are those of even steps. With them all three begin with one step of DDIM and
    converge with at most the second power of the step, for two reasons: grids are uneven in
    sigma / alpha, and the first step is of first order. Variable weights are those of the actual
    steps, and the first r steps use the slopes without momentum, each of them integrating again
    everything before it with the slope now known. This removes both limits, for orders above 2.
    Variable weights cost accuracy below about 50 steps, where neighboring steps differ much.

    Departure from the paper: it uses an order of 3.8, and the default here is 1.8. Without guidance
    3.8 is more accurate, but guided predictions turn faster than a polynomial through four slopes
    can follow, and it overshoots: on the embedded model at guidance 4 even with 25 steps
    (docs/samplers.md).
    """

    order: float = Field(
        default=1.8,
        ge=MIN_BETA,
        le=5,
        description=(
            "Number of slopes that a step uses, rounded up; a fraction sets beta, so 3.8 is order "
            "4 with beta 0.8. That is the published choice: better without guidance, unusable "
            "with strong guidance."
        ),
    )
    beta: float | None = Field(
        default=None,
        ge=MIN_BETA,
        le=1,
        description=(
            "Weight of the new slope in the velocity: 1 is no momentum, less suppresses "
            "divergence artifacts. By default the fraction of the order."
        ),
    )
    weights: Weights = Field(
        default="constant",
        description=(
            "Weights of the slopes. constant: those for equal steps, as published; variable: "
            "those for the actual steps, more accurate at orders above 2 from about 50 steps."
        ),
    )

    @model_validator(mode="after")
    def _beta_is_said_once(self) -> Self:
        fraction = self._fraction
        if fraction < MIN_BETA:
            raise ValueError(
                f"order is {self.order:g}, which implies a beta of {fraction:g}; at least "
                f"{MIN_BETA:g} is allowed."
            )
        if self.beta is not None and fraction < 1 and not isclose(self.beta, fraction):
            raise ValueError(
                f"beta is {self.beta:g} and order is {self.order:g}, which implies a beta of "
                f"{fraction:g}; give a whole order with beta, or the order alone."
            )
        if self.weights == "variable" and self.damping < MIN_VARIABLE_BETA:
            raise ValueError(
                f"weights is 'variable' and beta is {self.damping:g}; variable weights need a beta "
                f"of at least {MIN_VARIABLE_BETA:g}."
            )
        return self

    @property
    def slopes(self) -> int:
        """r, the number of slopes that a step uses."""
        return ceil(self.order)

    @property
    def damping(self) -> float:
        """Beta, the weight of the new slope in the velocity."""
        return self._fraction if self.beta is None else self.beta

    @property
    def _fraction(self) -> float:
        # 4.1 - 4 is a little below 0.1.
        return round(self.order - self.slopes + 1, 9)

    @property
    def _has_velocity(self) -> bool:
        return self.damping < 1

    @property
    @abstractmethod
    def _slots(self) -> tuple[str, ...]:
        """Names of the slots of history."""

    @property
    def _first_steps(self) -> int:
        """Number of first steps that use the slopes without momentum."""
        return self.slopes if self.weights == "variable" else 1

    @property
    def _order_without_momentum(self) -> int:
        return self.slopes if self.weights == "variable" else min(self.slopes, 2)

    @override
    def plan(self, grid: Grid) -> Plan:
        line = Line.of_schedule(grid)
        columns = Columns("x", *self._slots)
        tables: list[F64] = []
        known = 0
        for i in range(grid.steps):
            slope = line.slope(i, columns)
            memory = line.recalled(i, columns, self._slots[:known])
            if i < self._first_steps:
                slopes = [slope, *memory]
                mean = combined(line.mean_weights(i, i + 1, self.weights), slopes)
                x = line.step(i, columns, mean) + line.redone(i, slopes)
                memory = self._begun(slopes, mean) if i + 1 == self._first_steps else slopes
            else:
                mean, memory = self._moved(line, i, slope, memory)
                x = line.step(i, columns, mean)
            known = min(len(memory), len(self._slots))
            tables.append(columns.table(x=x, **line.kept(i + 1, x, memory, self._slots)))
        return Plan.of_steps(grid, tables)

    @abstractmethod
    def _begun(self, slopes: list[F64], mean: F64) -> list[F64]:
        """History after the first steps, from the known slopes, newest first, and their mean."""

    @abstractmethod
    def _moved(self, line: Line, i: int, slope: F64, memory: list[F64]) -> tuple[F64, list[F64]]:
        """The mean slope of a later step from point i, and the history after it."""


class PushedSampler(MomentumSampler, frozen=True):
    """What heavy ball and Nesterov share: a velocity driven by the Adams-Bashforth mean slope."""

    @property
    @override
    def convergence_order(self) -> int:
        return 1 if self._has_velocity else self._order_without_momentum

    @property
    @override
    def _slots(self) -> tuple[str, ...]:
        slopes = tuple(f"slope{k}" for k in range(1, self.slopes))
        return ("v", *slopes) if self._has_velocity else slopes

    @override
    def _begun(self, slopes: list[F64], mean: F64) -> list[F64]:
        return [mean, *slopes] if self._has_velocity else slopes

    @override
    def _moved(self, line: Line, i: int, slope: F64, memory: list[F64]) -> tuple[F64, list[F64]]:
        velocity, past = memory[: self._has_velocity], memory[self._has_velocity :]
        slopes = [slope, *past][: self.slopes]
        pushed = combined(line.mean_weights(i, len(slopes), self.weights), slopes)
        if not velocity:
            return pushed, slopes
        v = (1 - self.damping) * velocity[0] + self.damping * pushed
        return self._along(v, pushed), [v, *slopes]

    @abstractmethod
    def _along(self, velocity: F64, pushed: F64) -> F64:
        """The slope that a step follows."""


class HB(PushedSampler, frozen=True):
    """Heavy ball momentum on Adams-Bashforth.

    ``v <- (1 - beta) v + beta AB_r(slopes)``, and the step goes along v. First order, as v lags
    behind by ``1 / beta - 1`` steps; with beta 1 it has the order of Adams-Bashforth. One
    evaluation a step. History: v and r - 1 slopes. Meant for few steps at high guidance scales,
    where it suppresses divergence: on the real axis the stability limit of order 4 grows from 0.3
    to 0.45 at beta 0.8.
    """

    summary: ClassVar[str] = (
        "Adams-Bashforth with heavy ball momentum, against divergence artifacts."
    )
    source: ClassVar[str] = "Wizadwongsa et al., arXiv 2307.11118, algorithm 1."
    name: Literal["hb"] = "hb"

    @override
    def _along(self, velocity: F64, pushed: F64) -> F64:
        return velocity


class Nesterov(PushedSampler, frozen=True):
    """Nesterov momentum on Adams-Bashforth.

    The velocity is that of heavy ball, but the step goes along
    ``(1 - beta) v + beta AB_r(slopes)``. First order, with ``1 - beta`` times the lag of heavy
    ball: at beta 0.8 a twentieth of a step, which may take hundreds of steps to outweigh the
    second-order error. One evaluation a step. The history is that of heavy ball.
    """

    summary: ClassVar[str] = "Adams-Bashforth with Nesterov momentum; lags less than hb."
    source: ClassVar[str] = "Wizadwongsa et al., arXiv 2307.11118, equation 50."
    name: Literal["nesterov"] = "nesterov"

    @override
    def _along(self, velocity: F64, pushed: F64) -> F64:
        return (1 - self.damping) * velocity + self.damping * pushed


class GHVB(MomentumSampler, frozen=True):
    """Generalized heavy ball: momentum at the order of the multistep method.

    ``v <- (1 - beta) v + beta slope``, and the step goes along
    ``sum_j (gamma_j + (1 / beta - 1) gamma_{j-1}) (backward difference)^j v``, j < r, which
    compensates for the lag of v up to that order. One evaluation a step. History: r - 1
    velocities, and at least one where there is momentum. Order r with variable weights, at most 2
    with constant ones. Of the orders in the paper, 3.8 and 3.9 are the best trade-offs; here that
    holds only without guidance.
    """

    summary: ClassVar[str] = "Heavy ball momentum that keeps its order; stable at few steps."
    source: ClassVar[str] = "Wizadwongsa et al., arXiv 2307.11118, algorithm 2."
    name: Literal["ghvb"] = "ghvb"

    @property
    @override
    def convergence_order(self) -> int:
        return self._order_without_momentum

    @property
    @override
    def _slots(self) -> tuple[str, ...]:
        count = max(self.slopes - 1, int(self._has_velocity))
        return tuple(f"v{k}" for k in range(1, count + 1))

    @override
    def _begun(self, slopes: list[F64], mean: F64) -> list[F64]:
        """The velocities of a run that had been following the line before its first point.

        slope = v + c (v - previous v) with c = 1 / beta - 1, so v is a series in the backward
        differences of the slopes.
        """
        lag = 1 / self.damping - 1
        series = np.array([(-lag) ** k for k in range(len(slopes))])
        velocities: list[F64] = []
        for _ in slopes:
            velocities.append(combined(of_differences(series), slopes))
            # A shift by one step back is 1 minus a difference; the series is cut off at the number
            # of slopes.
            series = series - np.append(0, series[:-1])
        return velocities

    @override
    def _moved(self, line: Line, i: int, slope: F64, memory: list[F64]) -> tuple[F64, list[F64]]:
        v = slope
        if self._has_velocity:
            v = (1 - self.damping) * memory[0] + self.damping * slope
        velocities = [v, *memory][: self.slopes]
        of_slopes = line.mean_weights(i, len(velocities), self.weights)
        return combined(self._of_velocities(of_slopes), velocities), velocities

    def _of_velocities(self, of_slopes: F64) -> F64:
        """Weights of velocities, from the weights of the slopes that produced them.

        A slope is ``(v - (1 - beta) previous v) / beta``. The velocity before the oldest slope is
        unknown; it is chosen so that the last difference of velocities is 0. For even steps this
        gives the published gamma_j + (1 / beta - 1) gamma_{j-1}.
        """
        count = len(of_slopes)
        found = np.convolve(of_slopes, [1, self.damping - 1]) / self.damping
        vanishing = of_differences(np.append(np.zeros(count), 1.0))
        return (found - found[-1] / vanishing[-1] * vanishing)[:-1]

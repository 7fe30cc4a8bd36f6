"""What linear multistep samplers share: the line they integrate along, and weights of slopes.

With ``y = x / scale`` the probability-flow ODE is ``dy / ds = slope``, ``s = sigma / scale`` and
``slope = (x - scale D) / sigma``. The schedule chooses the scale: alpha, for which the slope is
eps, or 1 on flow matching, for which the slope is the velocity.

Past slopes are stored as the signal ``x - sigma slope`` that they imply at the current point. If
guidance or inpainting then moves x, they all change as the slope at the moved point does. Stored
directly, they would stay, and the jump between old slopes and the new one would be extrapolated as
if the flow had caused it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import comb
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from samplers.first_order import first_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers.grid import Grid
    from samplers.levels import F64
    from samplers.plan import Columns

Weights: TypeAlias = Literal["constant", "variable"]

BACKWARD_DIFFERENCES = np.array([1, 1 / 2, 5 / 12, 3 / 8, 251 / 720])
"""Weights of the backward differences of the slope in Adams-Bashforth with even steps."""

POINTS, SHARES = np.polynomial.legendre.leggauss(3)
"""Gauss-Legendre quadrature with three points, which is exact up to degree 5."""

SOUND_START = 1.5
"""Sum of absolute weights above which the first steps are not redone; see :meth:`Line.redone`."""


@dataclass(frozen=True)
class Line:
    """The points of a grid along a line.

    Attributes:
        grid: the points.
        scale: ``x / y`` at the points, ``[N + 1]``.
        s: the independent variable at the points, ``[N + 1]``; inf where there is no signal.
    """

    grid: Grid
    scale: F64
    s: F64

    @classmethod
    def of_noise(cls, grid: Grid) -> Line:
        """``x / alpha`` over ``sigma / alpha``, whose slope is eps."""
        with np.errstate(divide="ignore"):
            return cls(grid, grid.alpha, grid.sigma / grid.alpha)

    @classmethod
    def of_schedule(cls, grid: Grid) -> Line:
        """The line that the grid's schedule chooses."""
        scale = grid.schedule.line_scale(grid.alpha)
        with np.errstate(divide="ignore"):
            return cls(grid, scale, grid.sigma / scale)

    def slope(self, i: int, columns: Columns) -> F64:
        """The slope at point i, from the prediction just made there."""
        return (columns["x"] - self.scale[i] * columns.denoised) / self.grid.sigma[i]

    def recalled(self, i: int, columns: Columns, slots: Sequence[str]) -> list[F64]:
        """The slopes stored in ``slots``, at point i."""
        return [(columns["x"] - columns[slot]) / self.grid.sigma[i] for slot in slots]

    def kept(self, i: int, x: F64, slopes: Sequence[F64], slots: Sequence[str]) -> dict[str, F64]:
        """New contents of ``slots``, in order: ``slopes``, stored at point i with state x."""
        signals = (x - self.grid.sigma[i] * slope for slope in slopes)
        return dict(zip(slots, signals, strict=False))

    def step(self, i: int, columns: Columns, mean: F64) -> F64:
        """The state at point i + 1, given the mean slope over the step.

        At the first point the mean is the slope itself, the only one known.
        """
        held = first_order(self.grid, i, columns["x"], columns.denoised)
        if i == 0:
            return held
        return held + self.reach(i) * (mean - self.slope(i, columns))

    def reach(self, i: int) -> float:
        """How far a unit of slope over the step from point i moves x at point i + 1."""
        return self.scale[i + 1] * (self.s[i + 1] - self.s[i])

    def mean_weights(self, i: int, order: int, weights: Weights) -> F64:
        """Adams-Bashforth weights of the slopes at points i, i - 1, ... for the next step.

        They give the mean over that step of the polynomial through the slopes.

        Args:
            i: index of the point where the step starts.
            order: number of slopes to use, at most ``i + 1``.
            weights: "constant" for even steps, "variable" for those of the grid.
        """
        if weights == "constant":
            return of_differences(BACKWARD_DIFFERENCES[:order])
        nodes = self.s[i::-1][:order]
        # A node that is infinitely far away is left out of the polynomial.
        seen = np.isfinite(nodes)
        found = np.zeros(order)
        found[seen] = mean_of_interpolant(nodes[seen], nodes[0], self.s[i + 1])
        return found

    def redone(self, i: int, slopes: Sequence[F64]) -> F64:
        """The change of x at point i + 1 if the steps up to point i are made again.

        A run knows only one slope at its first point and two at its second, so its first step is of
        first order and its global error of second order, whatever follows. At each point i where
        the order still grows, everything from the first point on is therefore integrated again with
        the new slope, which takes no evaluation. The result is expressed as a change of x, so that
        what guidance changed in x is preserved.

        Where the first steps shrink s by more than about half, the polynomial through such uneven
        points oscillates, and nothing is redone.

        Args:
            i: index of a point up to which the order grew with each step.
            slopes: slopes at points i, i - 1, ..., 0.
        """
        if i == 0 or not all(self._soundly_redone(j) for j in range(1, i + 1)):
            return 0 * slopes[0]
        nodes, span = self.s[i::-1], self.s[i] - self.s[0]
        before = mean_of_interpolant(nodes[1:], self.s[0], self.s[i])
        now = mean_of_interpolant(nodes, self.s[0], self.s[i])
        return self.scale[i + 1] * span * combined(now - np.append(0, before), slopes)

    def _soundly_redone(self, i: int) -> bool:
        if not np.isfinite(self.s[0]):
            return False
        found = mean_of_interpolant(self.s[i::-1], self.s[0], self.s[i])
        return bool(np.abs(found).sum() <= SOUND_START)


def combined(weights: F64, slopes: Sequence[F64]) -> F64:
    """``sum_j weights_j slopes_j``, over as many slopes as there are weights."""
    return sum(w * slope for w, slope in zip(weights, slopes, strict=False)) + 0 * slopes[0]


def of_differences(coefficients: F64) -> F64:
    """Weights of values ``f_0, f_1, ...``, newest first, from those of their backward differences.

    The j-th difference is ``sum_k (-1)^k comb(j, k) f_k``.
    """
    return coefficients @ _signed_binomials(len(coefficients))


@cache
def _signed_binomials(count: int) -> F64:
    """``(-1)^k comb(j, k)`` at ``[j, k]``."""
    found = np.array([[(-1.0) ** k * comb(j, k) for k in range(count)] for j in range(count)])
    found.setflags(write=False)
    return found


def mean_of_interpolant(nodes: F64, start: float, end: float) -> F64:
    """Weights of values at ``nodes`` in the mean of the interpolating polynomial over an interval.

    Args:
        nodes: at most 6 distinct nodes.
        start: start of the interval.
        end: end of the interval.
    """
    at = start + (POINTS + 1) / 2 * (end - start)
    factors = np.ones((len(at), len(nodes), len(nodes)))
    others = ~np.eye(len(nodes), dtype=bool)
    away, apart = at[:, None, None] - nodes, nodes[:, None] - nodes
    np.divide(away, apart, out=factors, where=others)
    return SHARES @ factors.prod(2) / 2

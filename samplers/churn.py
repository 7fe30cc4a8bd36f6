"""Churn: the fresh noise that EDM's stochastic sampler adds before its steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.grid import Grid
from samplers.in_turn import in_turn
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.levels import F64
    from samplers.plan import Plan

MAX_GAMMA: Final = np.sqrt(2) - 1
"""The largest gamma, at which a step doubles the variance of the noise."""


class ChurnedSampler(Sampler, frozen=True):
    """A solver without history, with the churn of Karras et al. (arXiv 2206.00364, algorithm 2).

    Where r = sigma / alpha lies between ``s_tmin`` and ``s_tmax`` before a step, fresh noise raises
    it to ``r (1 + gamma)`` with ``gamma = min(s_churn / steps, sqrt(2) - 1)``. The step then starts
    from the raised level and ends where it would have ended anyway. With ``s_churn`` 0 this is the
    plain solver.

    Departures from the source: r is ``sigma / alpha`` on every schedule, and is never raised above
    the model's noisiest level. Where the first step has churn, the run starts from the raised
    level, which has the same distribution.
    """

    s_churn: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description=(
            "Fresh noise over the whole run: each step first raises sigma by the fraction"
            " s_churn / steps, at most 0.414; 0 is deterministic."
        ),
    )
    s_tmin: float = Field(
        default=0.0, ge=0, description="Lowest sigma / alpha at which s_churn adds noise."
    )
    s_tmax: float | None = Field(
        default=None,
        gt=0,
        description="Highest sigma / alpha at which s_churn adds noise; null is no limit.",
    )
    s_noise: float = Field(
        default=1.0,
        ge=0,
        le=2,
        description=(
            "Factor on the noise that s_churn adds; values slightly above 1 compensate for detail "
            "that the model removes."
        ),
    )

    @property
    @override
    def stochastic(self) -> bool:
        return self.s_churn > 0

    @abstractmethod
    def plain_plan(self, grid: Grid) -> Plan:
        """The table of a run over ``grid`` without churn."""

    @override
    def plan(self, grid: Grid) -> Plan:
        gamma = self._gamma(grid)
        if not gamma.any():
            return self.plain_plan(grid)
        descents = [_from_above(grid, i, gamma[i]) for i in range(grid.steps)]
        return in_turn(descents, self.plain_plan, self.s_noise)

    def _gamma(self, grid: Grid) -> F64:
        """The fraction by which each step first raises its noise level, ``[N]``."""
        with np.errstate(divide="ignore"):
            ratio = grid.sigma[:-1] / grid.alpha[:-1]
        highest = np.inf if self.s_tmax is None else self.s_tmax
        # Pure noise cannot be raised.
        acts = (self.s_tmin <= ratio) & (ratio <= highest) & np.isfinite(ratio)
        return np.where(acts, min(self.s_churn / grid.steps, MAX_GAMMA), 0.0)


def _from_above(grid: Grid, i: int, gamma: float) -> Grid:
    """Step i alone, from its level raised by the fraction gamma."""
    step = grid.part(i, i + 1)
    if gamma == 0:
        return step
    schedule = grid.schedule
    t = schedule.time_of_half_log_snr(grid.half_log_snr[i : i + 1] - np.log1p(gamma))
    t = np.minimum(t, schedule.t_start)
    alpha, sigma = schedule.level(t)
    return Grid(
        schedule,
        np.append(t, step.t[1:]),
        np.append(alpha, step.alpha[1:]),
        np.append(sigma, step.sigma[1:]),
    )

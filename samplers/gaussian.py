"""Data with exactly known denoiser and flow: the ground truth for measuring samplers.

Both classes stand in for a network in :func:`samplers.integrate`. They have no error of their own,
so the difference between a run and ``transport`` is the sampler's error alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from samplers.arguments import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from samplers.levels import F64
    from samplers.noise_schedule import NoiseSchedule

HALVINGS = 80
"""Bisections of a quantile's bracket: enough for float64."""
BRACKET = 12.0
"""Half-width of the search for a quantile, in standard deviations beyond the outermost means."""


@dataclass(frozen=True, slots=True)
class GaussianDenoiser:
    """The exact denoiser of data that is Gaussian in each element.

    Attributes:
        schedule: the noise schedule, of any kind.
        mean: mean of the data.
        deviation: standard deviation of the data, at least 0.

    Raises:
        ValueError: a deviation below 0, or numbers that are not finite.
    """

    schedule: NoiseSchedule
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        _check((1.0,), (self.mean,), (self.deviation,))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The posterior mean of the data given x at time t, of the shape of x."""
        alpha, sigma = _level(self.schedule, t)
        # The denominator is the marginal variance, so this is finite at both ends of the schedule.
        variance = (alpha * self.deviation) ** 2 + sigma**2
        return (sigma**2 * self.mean + alpha * self.deviation**2 * x) / variance

    def transport(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        """The exact result of the probability-flow ODE from one time to another, started at x.

        The distance from the mean, in standard deviations of the marginal, stays constant.
        """
        (alpha, sigma), (alpha_to, sigma_to) = (_level(self.schedule, t) for t in (t_from, t_to))
        score = (x - alpha * self.mean) / np.hypot(alpha * self.deviation, sigma)
        return alpha_to * self.mean + score * np.hypot(alpha_to * self.deviation, sigma_to)


@dataclass(frozen=True, slots=True)
class GaussianMixtureDenoiser:
    """The exact denoiser of data that is a mixture of Gaussians in each element.

    The denoised prediction is not linear in x, so no sampler appears to have a higher order than
    it has. Use float64 to see orders above two.

    Attributes:
        schedule: the noise schedule, of any kind.
        weights: shares of the components, summing to 1.
        means: their means.
        deviations: their standard deviations, at least 0.

    Raises:
        ValueError: weights, means and deviations differ in number, weights are below 0 or do not
            sum to 1, deviations are below 0, or numbers are not finite.
    """

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.4, 0.6)
    means: tuple[float, ...] = (-1.0, 0.8)
    deviations: tuple[float, ...] = (0.5, 0.4)

    def __post_init__(self) -> None:
        _check(self.weights, self.means, self.deviations)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The posterior mean of the data given x at time t, of the shape of x."""
        alpha, sigma = _level(self.schedule, t)
        means, deviations = np.array(self.means), np.array(self.deviations)
        spread = np.hypot(alpha * deviations, sigma)
        centre, width, weight, intercept, slope = x.new_tensor(
            np.stack(
                [
                    alpha * means,
                    spread,
                    np.log(np.array(self.weights) / spread),
                    sigma**2 * means / spread**2,
                    alpha * deviations**2 / spread**2,
                ]
            )
        )
        x = x[..., None]
        share = torch.softmax(weight - ((x - centre) / width) ** 2 / 2, -1)
        return (share * (intercept + slope * x)).sum(-1)

    def spread(self, t: float) -> F64:
        """Deviations of the components at time t, ``[components]``."""
        alpha, sigma = _level(self.schedule, t)
        return np.hypot(alpha * np.array(self.deviations), sigma)

    def transport(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        """The result of the probability-flow ODE from one time to another, started at x.

        In one dimension the flow preserves quantiles, so this inverts the distribution function
        by bisection: exact up to rounding, without an integrator.
        """
        quantile = self._distribution(x, t_from)
        alpha, _ = _level(self.schedule, t_to)
        centres, reach = alpha * np.array(self.means), BRACKET * self.spread(t_to)
        low = torch.full_like(x, float(np.min(centres - reach)))
        high = torch.full_like(x, float(np.max(centres + reach)))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self._distribution(middle, t_to) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _score(self, x: Tensor, t: float) -> Tensor:
        """Distances from the components' means, in their deviations, ``[..., components]``."""
        alpha, _ = _level(self.schedule, t)
        return (x[..., None] - alpha * x.new_tensor(self.means)) / x.new_tensor(self.spread(t))

    def _distribution(self, x: Tensor, t: float) -> Tensor:
        return (x.new_tensor(self.weights) * torch.special.ndtr(self._score(x, t))).sum(-1)


def _level(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.level(np.array(t))
    return float(alpha), float(sigma)


def _check(weights: Sequence[float], means: Sequence[float], deviations: Sequence[float]) -> None:
    if not len(weights) == len(means) == len(deviations):
        raise ValueError(
            f"weights, means and deviations have {len(weights)}, {len(means)} and "
            f"{len(deviations)} entries; each component has one of each."
        )
    for name, numbers in (("weights", weights), ("means", means), ("deviations", deviations)):
        for one in numbers:
            number(f"an entry of {name}", one)
    if not np.isfinite(means).all():
        raise ValueError(f"means are {tuple(means)}; they must be finite.")
    if not all(0 <= deviation < np.inf for deviation in deviations):
        raise ValueError(f"deviations are {tuple(deviations)}; they must be finite and at least 0.")
    if not all(weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-9:
        raise ValueError(f"weights are {tuple(weights)}; they must be at least 0 and sum to 1.")

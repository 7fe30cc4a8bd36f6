"""Times at the quantiles of a beta distribution."""

from __future__ import annotations

from math import exp, lgamma
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.spacing import LevelSpacing, times_between

if TYPE_CHECKING:
    from samplers.levels import F64, Levels

TERMS = 64
"""Terms of a series in which each is at most half the one before: enough for float64."""
ITERATIONS = 30
"""Maximum number of Newton iterations; 12 suffice for the spacing's range of parameters."""
LAST_STEP = 1e-10
"""Length in log x below which a Newton step is the last: the error left is about its square."""


class Beta(LevelSpacing, frozen=True):
    """Beta Sampling (Lee et al., arXiv 2407.12173): dense at both ends, sparse between.

    Quantiles of Beta(alpha, beta) over time, at probabilities from 1 (the noisiest time) down to
    1 / steps, as in ComfyUI. In AUTOMATIC1111 and diffusers the same name stands for quantiles
    over sigma with both ends included; ``over`` selects which.
    """

    summary: ClassVar[str] = "Dense at the noisiest and the cleanest levels, sparse in between."
    source: ClassVar[str] = "Lee et al., arXiv 2407.12173; ComfyUI, diffusers."
    name: Literal["beta"] = "beta"
    alpha: float = Field(
        default=0.6,
        ge=0.3,
        le=5,
        description="Values below 1 are dense at the clean end; lower is denser.",
    )
    beta: float = Field(
        default=0.6,
        ge=0.3,
        le=5,
        description="Values below 1 are dense at the noisy end; lower is denser.",
    )
    over: Literal["time", "sigma"] = Field(
        default="time",
        description=(
            "Variable that the quantiles are taken of: time, as in the paper and ComfyUI, or "
            "sigma, as in diffusers and AUTOMATIC1111."
        ),
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        share = beta_quantile(np.linspace(1, 0, count), self.alpha, self.beta)
        if self.over == "sigma":
            return times_between(schedule, share, t_start, t_end)
        first, last = schedule.measure(np.array([t_start, t_end]))
        return schedule.time_of_measure(last + share * (first - last))

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        count = steps if self.over == "sigma" else steps + 1
        return self.fill(schedule, count, schedule.t_start, schedule.t_end)[:steps]


def beta_quantile(probability: F64, alpha: float, beta: float) -> F64:
    """The inverse of the regularised incomplete beta function, ``I_x(alpha, beta) = p``.

    The error is at most 1e-12 relative to x where x is at most a half, and 1e-12 absolute above.

    Args:
        probability: p in [0, 1], of any shape.
        alpha: first parameter, above 0.
        beta: second parameter, above 0 and at most about 20.

    Returns:
        x in [0, 1].
    """
    below = _lower_tail(np.array(np.log(0.5)), alpha, beta)
    low = probability <= below
    # I_x(a, b) = 1 - I_{1-x}(b, a): each quantile is computed where the series converges fast.
    return np.where(
        low,
        _lower_quantile(np.where(low, probability, 0), alpha, beta),
        1 - _lower_quantile(np.where(low, 0, 1 - probability), beta, alpha),
    )


def _lower_tail(log_x: F64, alpha: float, beta: float) -> F64:
    """``I_x(alpha, beta)`` for x up to a half, by its power series (DLMF 8.17.7)."""
    k = np.arange(1, TERMS)
    falling = np.append(1.0, np.cumprod((k - beta) / k))
    series = np.polynomial.polynomial.polyval(np.exp(log_x), falling / (alpha + np.arange(TERMS)))
    return np.exp(alpha * log_x) * series / _beta_function(alpha, beta)


def _lower_quantile(probability: F64, alpha: float, beta: float) -> F64:
    """Quantiles up to a half, by Newton's method on log p as a function of log x.

    That function is convex for beta below 1 and concave above. The root of its leading term lies
    on the side from which Newton's method never overshoots.
    """
    whole = _beta_function(alpha, beta)
    with np.errstate(divide="ignore"):
        log_p = np.log(probability)
    found = np.isfinite(log_p)
    target = np.where(found, log_p, 0)
    log_x = np.minimum((target + np.log(alpha * whole)) / alpha, np.log(0.5))
    for _ in range(ITERATIONS):
        tail = _lower_tail(log_x, alpha, beta)
        slope = np.exp(alpha * log_x + (beta - 1) * np.log1p(-np.exp(log_x))) / (whole * tail)
        before = log_x
        log_x = np.minimum(before + (target - np.log(tail)) / slope, np.log(0.5))
        if np.abs(log_x - before).max(initial=0) < LAST_STEP:
            break
    return np.where(found, np.exp(log_x), 0)


def _beta_function(alpha: float, beta: float) -> float:
    return exp(lgamma(alpha) + lgamma(beta) - lgamma(alpha + beta))

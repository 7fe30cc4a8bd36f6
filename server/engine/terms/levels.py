"""Positions of a plan's stages in the diffusion process of a model's noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guidance.diffusion_levels import DiffusionLevels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from samplers import NoiseSchedule, Plan

TRAINED_STEPS = 1000
"""Number of diffusion steps for which variances are published."""


def levels_of(plan: Plan, schedule: NoiseSchedule) -> DiffusionLevels:
    """Noise level, time and variance of each stage of a plan, on the scales of a schedule."""
    span = schedule.t_start - schedule.t_end
    everywhere = np.linspace(schedule.t_end, schedule.t_start, TRAINED_STEPS)
    alpha, sigma, t = (np.asarray(v[:-1], np.float64) for v in (plan.alpha, plan.sigma, plan.t))
    return DiffusionLevels(
        alpha=alpha,
        sigma=sigma,
        time=np.clip((t - schedule.t_end) / span, 0, 1),
        variance=_variance(t, schedule) / _variance(everywhere, schedule).max(),
    )


def _variance(t: NDArray[np.float64], schedule: NoiseSchedule) -> NDArray[np.float64]:
    """Variance of the noise added by one of a thousand steps around times t, in (0, 1].

    Only the log SNR of the schedule is used, as if it were variance-preserving.
    """
    length = (schedule.t_start - schedule.t_end) / TRAINED_STEPS
    first = np.clip(t - length / 2, schedule.t_end, schedule.t_start - length / 2)
    last = np.clip(t + length / 2, schedule.t_end + length / 2, schedule.t_start)
    with np.errstate(divide="ignore", over="ignore"):
        before, after = (np.logaddexp(0, -2 * schedule.half_log_snr(end)) for end in (first, last))
    return -np.expm1((before - after) * length / (last - first))

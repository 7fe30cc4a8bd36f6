"""Whether a plan draws a path of the reverse diffusion, with all of its noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from samplers.plan import Plan


def follows_reverse_sde(plan: Plan) -> bool:
    """Whether each step goes down by the noise of the reverse diffusion, and is one evaluation.

    From r to r' = sigma' / alpha' that noise is of deviation ``sigma' sqrt(1 - (r' / r)^2)``: what
    the posterior of x' has, given x and the clean picture. Samplers that draw less are nearer to
    the probability-flow ODE, those that draw more (LCM) forget what they came from.

    Args:
        plan: of any sampler.
    """
    if plan.evaluations != plan.steps or any(plan.langevin):
        return False
    # The inverse of r: 0 at pure noise, infinite only where the run lands.
    with np.errstate(divide="ignore"):
        clean = plan.alpha / plan.sigma
    if not np.all(np.diff(clean) > 0):
        return False
    drawn = plan.tables[:, 0, -2].reshape(plan.evaluations, -1)
    due = plan.sigma[1:] * np.sqrt(1 - (clean[:-1] / clean[1:]) ** 2)
    return bool(np.allclose(np.abs(drawn), due[:, None], rtol=1e-6, atol=1e-12))

"""A check whether a plan samples a path of the reverse diffusion, with all of its noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from samplers.plan import Plan


def follows_reverse_sde(plan: Plan) -> bool:
    """Whether each step adds the noise of the reverse diffusion, and takes one evaluation.

    From r = sigma / alpha to r' = sigma' / alpha', the standard deviation of that noise is
    ``sigma' sqrt(1 - (r' / r)^2)``, that of the posterior of x' given x and the clean picture.
    Samplers that draw less noise are nearer to the probability-flow ODE; those that draw more (LCM)
    lose their dependence on the previous state.

    Args:
        plan: plan of any sampler.
    """
    if plan.evaluations != plan.steps or any(plan.langevin):
        return False
    # The inverse of r: 0 at pure noise, infinite only at the end of the run.
    with np.errstate(divide="ignore"):
        clean = plan.alpha / plan.sigma
    if not np.all(np.diff(clean) > 0):
        return False
    drawn = plan.tables[:, 0, -2].reshape(plan.evaluations, -1)
    due = plan.sigma[1:] * np.sqrt(1 - (clean[:-1] / clean[1:]) ** 2)
    return bool(np.allclose(np.abs(drawn), due[:, None], rtol=1e-6, atol=1e-12))

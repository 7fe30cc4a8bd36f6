"""From a resolved request to the engine's tasks: one an image, all on one plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplers import Plan
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.requests.classifier_check import aim_of, levels_of
from server.requests.group_check import avoided_of, group_of
from server.requests.guidance_check import check_windows, coefficients_for
from server.requests.schema import ResolvedRequest, split

__all__ = ["seeds_of", "tasks_of"]


def seeds_of(resolved: ResolvedRequest) -> range:
    """The seeds of the request's images, in their order."""
    return range(resolved.seed, resolved.seed + resolved.n)


def tasks_of(
    resolved: ResolvedRequest,
    model: HostedModel,
    plan: Plan,
    *,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
) -> list[ImageTask]:
    """One task an image.

    Args:
        resolved: the request.
        model: that will serve it.
        plan: of its sampler.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1].
        mask: ``[H, W]`` float32, 1 to repaint, 0 to keep.
        reference: picture to keep away from, as ``image``.

    Raises:
        InvalidRequest: guidance that cannot act along this plan, or is not fitted to it.
    """
    rule, policy = split(resolved.guidance)
    check_windows(resolved.guidance, plan)
    coefficients = coefficients_for(resolved, model, plan)
    aim = aim_of(resolved, model, plan)
    group = group_of(resolved, plan)
    avoided = avoided_of(resolved, plan, reference)
    tuning = resolved.guidance.skip_tuning
    perturbed = resolved.guidance.perturbed
    strengths: NDArray[np.float64] | None = None
    if perturbed:
        levels = levels_of(plan, model.facts.schedule)
        strengths = np.array([one.strengths(levels) for one in perturbed])
    return [
        ImageTask(
            model=model.facts.name,
            prompt=resolved.prompt,
            negative_prompt=resolved.negative_prompt,
            width=resolved.width,
            height=resolved.height,
            seed=seed,
            plan=plan,
            rule=rule,
            policy=policy,
            perturbed=perturbed,
            strengths=strengths,
            edits=() if tuning is None else (tuning.edit,),
            aim=aim,
            coefficients=coefficients,
            group=group,
            avoided=avoided,
            image=image,
            mask=mask,
            previews=resolved.stream,
        )
        for seed in seeds_of(resolved)
    ]

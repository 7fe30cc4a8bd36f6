"""Turns a prepared request into the engine's tasks: one for each image, all on one plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from guidance.classifier_guidance import UNAIMED
from samplers import Plan
from server.engine.task import Aim, Avoided, Group, ImageTask
from server.models.hosted import HostedModel
from server.requests.checks.classifier import alternatives_of, classifier_of
from server.requests.checks.group import is_group
from server.requests.resolve import Prepared
from server.requests.schema import Guidance, ResolvedRequest, split
from server.requests.stage_levels import levels_of

__all__ = ["seeds_of", "tasks_of"]


def seeds_of(resolved: ResolvedRequest) -> range:
    """The seeds of the request's images, in their order."""
    return range(resolved.seed, resolved.seed + resolved.n)


def tasks_of(
    prepared: Prepared,
    model: HostedModel,
    *,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
) -> list[ImageTask]:
    """One task for each image.

    Args:
        prepared: the request, checked, and the plan of its sampler.
        model: that will serve it.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1].
        mask: ``[H, W]`` float32, 1 to repaint, 0 to keep.
        reference: picture to keep away from, as ``image``.
    """
    resolved, plan = prepared.request, prepared.plan
    rule, policy = split(resolved.guidance)
    aim = _aim_of(resolved, model, plan)
    group = _group_of(resolved.guidance)
    avoided = _avoided_of(resolved.guidance, reference)
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
            coefficients=prepared.coefficients,
            group=group,
            avoided=avoided,
            image=image,
            mask=mask,
            previews=resolved.stream,
        )
        for seed in seeds_of(resolved)
    ]


def _group_of(guidance: Guidance) -> Group | None:
    """The group that all images of the request form; None where each is by itself."""
    if not is_group(guidance):
        return None
    return Group(particles=guidance.particles, apart=guidance.negtome)


def _avoided_of(guidance: Guidance, reference: Tensor | None) -> Avoided | None:
    """The picture that every image of the request keeps away from, if there is one."""
    if reference is None or guidance.negtome is None:
        return None
    return Avoided(reference, guidance.negtome)


def _aim_of(resolved: ResolvedRequest, model: HostedModel, plan: Plan) -> Aim | None:
    """What every image of the request asks of the classifier; None where it asks nothing."""
    term = resolved.guidance.classifier
    if term is None:
        return None
    heads = classifier_of(term, model).heads
    acts = term.evaluates(plan.noise_ratio, plan.progress)
    numbers = (
        classes.index(term.aims[attribute]) if attribute in term.aims else UNAIMED
        for attribute, classes in heads.items()
    )
    return Aim(
        guidance=term,
        targets=tuple(numbers),
        strengths=acts * term.strengths(levels_of(plan, model.facts.schedule)),
        alternatives=alternatives_of(resolved, model),
    )

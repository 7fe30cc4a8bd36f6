"""Warnings about settings of a valid request that have no effect or do not suit its model."""

from __future__ import annotations

import json
from typing import Any

from guidance import NAG
from guidance.parts import chosen
from samplers import Plan
from server.models.conventions import numbers
from server.models.hosted import HostedModel
from server.requests.defaults import own_defaults
from server.requests.embeddings import texts_of, unfit_embeddings
from server.requests.schema import ResolvedRequest
from server.requests.windows import without_effect

__all__ = ["warnings_for"]

LED_BY_THE_FIRST_SLOPE = frozenset({"heun", "plms", "restart"})
"""Samplers that overshoot if the first steps cover thousands of sigma."""

MAX_GAIN = 5.0
"""Maximum gain of prediction errors per step. `plms` has up to 3 with all models; `lms` has more
than 8 in up to 8 steps of models whose levels crowd at the noisy end, and its pictures are then far
off."""

THOUSANDS = 1000.0
STEPS_TO_RECOVER = 20
"""Number of steps from which these samplers recover, measured on models with zero terminal SNR
whose schedule begins at sigma 4096."""


def warnings_for(resolved: ResolvedRequest, model: HostedModel, plan: Plan) -> tuple[str, ...]:
    """Return one sentence for each setting that has no effect, or that does not suit the model.

    Args:
        resolved: request.
        model: model that will serve it.
        plan: plan of its sampler.
    """
    found: list[str] = []
    if resolved.negative_prompt and (reason := _without_negative_prompt(resolved, plan)):
        found.append(f"negative_prompt has no effect: {reason}.")
    drawn_anew = model.facts.reads_mask and resolved.strength == 1
    if resolved.mask_content not in (None, "original") and drawn_anew:
        found.append(
            f"mask_content has no effect: at strength 1 model {model.facts.name!r}, which reads "
            "the picture and the mask as inputs, starts from noise alone."
        )
    own = own_defaults(model, resolved.adapters)
    adapted = "" if own is model.facts.defaults else " with these adapters"
    if own is not None and own.counts and resolved.steps not in own.counts:
        found.append(
            f"steps is {resolved.steps}; use {numbers(own.counts)}, which model "
            f"{model.facts.name!r}{adapted} was distilled for."
        )
    churn = getattr(resolved.sampler, "s_churn", 0) and getattr(resolved.sampler, "s_noise", 0)
    if churn and not any(plan.noisy):
        found.append(
            f"sampler {resolved.sampler.name!r} adds no noise by s_churn: no step after the first "
            "begins at a sigma / alpha between s_tmin and s_tmax."
        )
    if _overshoots(resolved, model, plan):
        found.append(
            f"sampler {resolved.sampler.name!r} overshoots in fewer than {STEPS_TO_RECOVER} steps "
            f"on model {model.facts.name!r}, which begins at sigma "
            f"{plan.sigma[0] / plan.alpha[0]:.0f}; take more steps, or 'ddim', 'euler' or 'unipc'."
        )
    if not plan.elementwise and abs(plan.weights).sum() > MAX_GAIN * plan.steps:
        found.append(
            f"sampler {resolved.sampler.name!r} amplifies errors of the model at the noise levels "
            f"of these {plan.steps} steps; take more steps, or 'euler' or 'dpm_solver_pp'."
        )
    guidance = resolved.guidance
    of_one = model.facts.one_prediction or (own is not None and not own.rule.combines)
    if of_one and guidance.branches and not guidance.policy.embeds:
        found.append(
            f"guidance {guidance.name!r} combines several predictions, but model "
            f"{model.facts.name!r}{adapted} was distilled to be sampled from one; "
            f"{_of_one(model)}."
        )
    for beside, acts in (
        ("adapters", any(one.weight for one in resolved.adapters)),
        ("ControlNets", any(one.scale for one in resolved.controls)),
        ("image prompts", any(one.scale for one in resolved.image_prompts)),
    ):
        if acts and (fitted := _fitted(resolved)):
            found.append(
                f"{fitted} is fitted to model {model.facts.name!r} without {beside}, so it may be "
                "less accurate here."
            )
    found += unfit_embeddings([text for _, text in texts_of(resolved, model)], model)
    return (
        *found,
        *without_effect("controls", resolved.controls, plan),
        *without_effect("image_prompts", resolved.image_prompts, plan),
    )


def _overshoots(resolved: ResolvedRequest, model: HostedModel, plan: Plan) -> bool:
    """Return whether the sampler overshoots in its first step, from a sigma in the thousands."""
    if resolved.sampler.name not in LED_BY_THE_FIRST_SLOPE or resolved.steps >= STEPS_TO_RECOVER:
        return False
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    return bool(plan.sigma[0] > THOUSANDS * schedule.line_scale(plan.alpha[:1])[0])


def _fitted(resolved: ResolvedRequest) -> str | None:
    """Return the setting that uses numbers fitted to the model; None if there is none."""
    sampler, policy = resolved.sampler, resolved.guidance.policy
    if sampler.uses_statistics:
        return f"sampler {sampler.name!r}"
    if policy.fitted and resolved.guidance.branches:
        return f"guidance.policy {policy.name!r}"
    return None


def _of_one(model: HostedModel) -> str:
    """Return the guidance for a model that was distilled to be sampled from one prediction."""
    instead: dict[str, Any] = (
        {"name": "cfg", "policy": "embedded"} if model.facts.embeds_scale else {"name": "none"}
    )
    plain = f"use {json.dumps(instead)}"
    if model.refuses(NAG().edit) is not None:
        return plain
    led_away = json.dumps(instead | {"nag": {}})
    return f"{plain}, or {led_away} to steer away from a negative prompt"


def _without_negative_prompt(resolved: ResolvedRequest, plan: Plan) -> str | None:
    """Return why the negative prompt is never evaluated; None if it is."""
    guidance, policy = resolved.guidance, resolved.guidance.policy
    if any(getattr(part, "reads_negative_prompt", False) for _, part in chosen(guidance)):
        return None
    if not guidance.combines:
        return f"guidance {guidance.name!r} evaluates only the prompt"
    if not any(branch.told == "negative" for branch in guidance.branches):
        return f"guidance {guidance.name!r} does not use it at these parameters"
    if policy.embeds:
        return (
            f"with the policy {policy.name!r} the network applies guidance itself and reads only "
            "the prompt"
        )
    if not policy.evaluates(plan.noise_ratio, plan.progress).any():
        return f"the policy {policy.name!r} never evaluates it with these parameters"
    return None

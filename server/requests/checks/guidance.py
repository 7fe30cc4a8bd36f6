"""Checks that guidance settings are compatible with each other, the model and the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from guidance import Edit, Policy, Rule
from guidance.parts import chosen
from guidance.window import Window
from samplers import Plan
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.models.linear_fits import PREFIX as LINEAR_FITS
from server.models.linear_fits import identity_of
from server.requests.schema import Guidance, ResolvedRequest, split

__all__ = ["check_guidance", "check_windows", "coefficients_for"]


def check_guidance(guidance: Guidance, model: HostedModel, *, has_picture: bool) -> None:
    """Refuse guidance whose parts are incompatible with each other or with the model.

    Args:
        guidance: the rule and everything that goes with it.
        model: model that will serve the request.
        has_picture: whether the run starts from an image.

    Raises:
        InvalidRequest: a policy that has nothing to decide or lacks what it needs, or a change
            inside the network that the model cannot make.
    """
    if reason := _against_policy(guidance, model, has_picture=has_picture):
        raise InvalidRequest(
            "guidance.policy", f"guidance.policy is {guidance.policy.name!r}; {reason}."
        )
    for field, edit in _edits(guidance):
        if reason := model.refuses(edit):
            raise InvalidRequest(field, f"{field}: model {model.facts.name!r} {reason}.")


def check_windows(guidance: Guidance, plan: Plan) -> None:
    """Refuse a part of guidance that would never act, because no step lies within its window.

    Args:
        guidance: guidance of the request.
        plan: plan of its sampler.

    Raises:
        InvalidRequest: a window contains none of the steps, or the policy guides at none of them.
    """
    for path, part in chosen(guidance):
        if isinstance(part, Window) and not part.contains(plan.noise_ratio, plan.progress).any():
            field = f"guidance.{path}"
            raise InvalidRequest(
                field,
                f"{field}: none of the {plan.steps} steps lies within its window; take more steps, "
                "or widen low, high, start or stop.",
            )
    if not guidance.policy.acts(plan.noise_ratio, plan.progress).any():
        raise InvalidRequest(
            "guidance.policy",
            f"guidance.policy is {guidance.policy.name!r}; with these parameters it guides at none "
            f"of the {plan.steps} steps.",
        )


def coefficients_for(
    resolved: ResolvedRequest, model: HostedModel, plan: Plan
) -> NDArray[np.float64] | None:
    """Return the coefficients that the request's policy was fitted to; None if it needs none.

    Raises:
        InvalidRequest: nothing is fitted to this run, and the message has the command that fits it
            and lists what is fitted; or the fitted coefficients do not match the run's stages and
            branches.
    """
    guidance = resolved.guidance
    rule, policy = split(guidance)
    if not policy.fitted or not rule.branches:
        return None
    fit = model.linear_fits.find(identity_of(model.facts.denoiser, plan, rule, policy.fit_period))
    if fit is not None:
        try:
            return policy.constants(plan.evaluations, len(rule.branches), fit.coefficients)
        except ValueError as error:
            raise InvalidRequest(
                "guidance.policy",
                f"{error} A file of the model's folder is damaged; fit it again with `weft "
                f"{policy.fitted_by} {_options(resolved, rule, policy)}`, or choose another "
                "policy.",
            ) from None
    if plan.steps < resolved.sampler.steps_taken(resolved.steps):
        remedy = "use `strength` 1, which runs all steps"
    else:
        remedy = f"fit it with `weft {policy.fitted_by} {_options(resolved, rule, policy)}`"
    raise InvalidRequest(
        "guidance.policy",
        f"guidance.policy is {policy.name!r}, and it is not fitted to this sampler, spacing, steps "
        f"and guidance of model {model.facts.name!r}; {remedy}, or choose another policy"
        f"{_fitted(model)}.",
    )


def _fitted(model: HostedModel) -> str:
    """Return what coefficients exist for, as the end of a sentence."""
    fitted = model.linear_fits.available(model.facts.denoiser)
    return f" (fitted are: {'; '.join(fitted)})" if fitted else " (nothing is fitted)"


def _options(resolved: ResolvedRequest, rule: Rule, policy: Policy) -> str:
    """Return the command's options for the request's run."""
    named = {"sampler": resolved.sampler, "spacing": resolved.spacing, "guidance": rule}
    options = [f"--model PATH --steps {resolved.steps} --every {policy.fit_period}"]
    for option, one in named.items():
        own = one.model_dump(mode="json", exclude_defaults=True)
        value = one.name if not own else f"'{json.dumps({'name': one.name, **own})}'"
        options.append(f"--{option} {value}")
    return " ".join(options)


def _against_policy(guidance: Guidance, model: HostedModel, *, has_picture: bool) -> str | None:
    """Return why the policy is refused and what is allowed; None if it is not."""
    policy = guidance.policy
    if reason := policy.refuses(guidance):
        return reason
    if policy.wants_reference and not has_picture:
        instead = policy.without_reference
        return "with these parameters it needs a picture to start from; send `image`" + (
            f", or set {instead}" if instead else ""
        )
    if policy.fitted and policy.fitted_by != LINEAR_FITS:
        return (
            "it needs coefficients fitted beforehand, and this server has no command that fits it"
        )
    if policy.embeds and not model.facts.embeds_scale:
        return (
            f"model {model.facts.name!r} does not take a guidance scale as input (its config has "
            "neither `time_cond_proj_dim` nor `guidance_embeds`); choose another policy"
        )
    return None


def _edits(guidance: Guidance) -> Iterator[tuple[str, Edit]]:
    """Yield every change inside the network, with the field that requests it."""
    for path, part in chosen(guidance):
        if (edit := getattr(part, "edit", None)) is not None:
            yield f"guidance.{path}", edit
    for branch in guidance.branches:
        if branch.edit is not None:
            yield "guidance", branch.edit

"""What of a request's guidance does not go together, or not with its model and its run."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from guidance import POLICIES, Edit, Rule
from guidance.linear_adaptive import LinearAdaptive
from guidance.window import Window
from samplers import Plan
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.models.linear_fits import identity_of
from server.requests.choice import listed, name_of
from server.requests.schema import Guidance, ResolvedRequest, split

__all__ = ["check_guidance", "check_window", "check_windows", "coefficients_for"]


def check_guidance(guidance: Guidance, model: HostedModel, *, has_picture: bool) -> None:
    """Refuse guidance that could not act as it says.

    Args:
        guidance: a rule, its policy, and what is changed inside the network.
        model: that will serve it.
        has_picture: whether the run starts from a picture.

    Raises:
        InvalidRequest: a policy that has nothing to do or lacks what it needs, or a change that
            the model cannot make.
    """
    if reason := _against_policy(guidance, model, has_picture=has_picture):
        raise InvalidRequest(
            "guidance.policy", f"guidance.policy is {guidance.policy.name!r}; {reason}."
        )
    for field, edit in _edits(guidance):
        if reason := model.refuses(edit):
            raise InvalidRequest(field, f"{field}: model {model.facts.name!r} {reason}.")


def check_windows(guidance: Guidance, plan: Plan) -> None:
    """Refuse a perturbation that would never act.

    Raises:
        InvalidRequest: its window holds none of the steps.
    """
    for k, perturbation in enumerate(guidance.perturbed):
        whose = f"the window of {perturbation.name!r}"
        check_window(perturbation, plan, f"guidance.perturbed.{k}", whose)


def check_window(window: Window, plan: Plan, field: str, whose: str) -> None:
    """Refuse what would never act along a plan.

    Args:
        window: when it acts.
        plan: of the request's sampler.
        field: of the request.
        whose: what the sentence calls the window.

    Raises:
        InvalidRequest: the window holds none of the steps.
    """
    if not window.contains(plan.noise_ratio, plan.progress).any():
        raise InvalidRequest(
            field,
            f"{field}: {whose} holds none of the {plan.steps} steps; take more steps, or widen "
            "low, high, start or stop.",
        )


def coefficients_for(
    resolved: ResolvedRequest, model: HostedModel, plan: Plan
) -> NDArray[np.float64] | None:
    """What the request's policy was fitted to beforehand; None where it needs nothing.

    Raises:
        InvalidRequest: nothing is fitted to this run, with the command that fits.
    """
    guidance = resolved.guidance
    rule, policy = split(guidance)
    if not isinstance(policy, LinearAdaptive) or not rule.branches:
        return None
    fit = model.linear_fits.find(identity_of(model.facts.revision, plan, rule, policy.every))
    if fit is not None:
        return fit.coefficients
    if plan.steps < resolved.sampler.steps_taken(resolved.steps):
        remedy = "leave `image` out or use `strength` 1"
    else:
        remedy = f"fit it with `weft linear-ag {_options(resolved, rule, policy)}`"
    raise InvalidRequest(
        "guidance.policy",
        f"guidance.policy is {policy.name!r}, and it is not fitted to this sampler, spacing, steps "
        f"and guidance of model {model.facts.name!r}; {remedy}, or choose another policy.",
    )


def _options(resolved: ResolvedRequest, rule: Rule, policy: LinearAdaptive) -> str:
    """The command's options that stand for the request's run."""
    named = {"sampler": resolved.sampler, "spacing": resolved.spacing, "guidance": rule}
    options = [f"--model PATH --steps {resolved.steps} --every {policy.every}"]
    for option, one in named.items():
        own = one.model_dump(mode="json", exclude_defaults=True)
        value = one.name if not own else f"'{json.dumps({'name': one.name, **own})}'"
        options.append(f"--{option} {value}")
    return " ".join(options)


def _against_policy(guidance: Guidance, model: HostedModel, *, has_picture: bool) -> str | None:
    """What speaks against the policy, and what is allowed."""
    policy, branches = guidance.policy, len(guidance.branches)
    if not guidance.combines and policy.name != "always":
        return f"the rule {guidance.name!r} has no second branch, so only 'always' is allowed"
    if policy.estimates and branches > 1:
        others = [name_of(kind) for kind in POLICIES if not kind.estimates and not kind.embeds]
        return (
            f"it estimates one branch and the rule {guidance.name!r} has {branches}; "
            f"allowed are: {listed(others)}"
        )
    if policy.wants_reference and not has_picture:
        return "at these parameters it needs a picture to start from; send `image`"
    if policy.embeds and not model.facts.embeds_scale:
        return (
            f"model {model.facts.name!r} is not told a guidance scale (its U-Net has no "
            "`time_cond_proj_dim`), so it must be guided from outside"
        )
    if policy.embeds and guidance.name != "cfg":
        return f"the network guides by 'cfg' itself, and cannot by {guidance.name!r}"
    return None


def _edits(guidance: Guidance) -> Iterator[tuple[str, Edit]]:
    """Every change inside the network, with the field that asks for it."""
    for k, perturbation in enumerate(guidance.perturbed):
        yield f"guidance.perturbed.{k}", perturbation.edit
    if guidance.skip_tuning is not None:
        yield "guidance.skip_tuning", guidance.skip_tuning.edit
    for branch in guidance.branches:
        if branch.edit is not None:
            yield "guidance", branch.edit

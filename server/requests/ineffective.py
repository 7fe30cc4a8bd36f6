"""Finds settings of a valid request that have no effect on its images."""

from __future__ import annotations

from guidance.parts import chosen
from samplers import Plan
from server.requests.schema import ResolvedRequest

__all__ = ["warnings_for"]


def warnings_for(resolved: ResolvedRequest, plan: Plan) -> tuple[str, ...]:
    """One sentence for each setting that has no effect.

    Args:
        resolved: the request.
        plan: of its sampler.
    """
    if not resolved.negative_prompt:
        return ()
    reason = _without_negative_prompt(resolved, plan)
    return () if reason is None else (f"negative_prompt has no effect: {reason}.",)


def _without_negative_prompt(resolved: ResolvedRequest, plan: Plan) -> str | None:
    """Why the negative prompt is never evaluated; None if it is."""
    guidance, policy = resolved.guidance, resolved.guidance.policy
    if any(getattr(part, "reads_negative_prompt", False) for _, part in chosen(guidance)):
        return None
    if not guidance.combines:
        return f"guidance {guidance.name!r} evaluates the prompt alone"
    if not any(branch.told == "negative" for branch in guidance.branches):
        return f"guidance {guidance.name!r} does not use it at these parameters"
    if policy.embeds:
        return f"with the policy {policy.name!r} the network guides itself by the prompt alone"
    if not policy.evaluates(plan.noise_ratio, plan.progress).any():
        return f"the policy {policy.name!r} never evaluates it with these parameters"
    return None

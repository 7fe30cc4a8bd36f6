"""Checks that a step cache is compatible with the images' guidance and the plan."""

from __future__ import annotations

from samplers import Plan
from server.errors import InvalidRequest
from server.requests.checks.group import is_group
from server.requests.schema import ResolvedRequest

__all__ = ["check_cache", "check_cache_along"]


def check_cache(resolved: ResolvedRequest) -> None:
    """Refuse a step cache for images that depend on each other.

    Raises:
        InvalidRequest: they are evaluated together at every stage, so none can leave one out.
    """
    guidance, cache = resolved.guidance, resolved.cache
    if cache is not None and is_group(guidance):
        part = "particles" if guidance.particles is not None else "negtome"
        raise InvalidRequest(
            "cache",
            f"cache is {cache.name!r}, but the images of a request with guidance.{part} need each "
            "other's predictions at every step; leave cache out.",
        )


def check_cache_along(resolved: ResolvedRequest, plan: Plan) -> None:
    """Refuse a step cache that can leave out no evaluation of the plan.

    Raises:
        InvalidRequest: there are too few, or none of them lies within the cache's window.
    """
    cache = resolved.cache
    if cache is not None and not cache.may_recall(plan.noise_ratio, plan.progress).any():
        raise InvalidRequest(
            "cache",
            f"cache is {cache.name!r}; it can skip none of the {plan.evaluations} evaluations of "
            f"this run, because the first {cache.warm_up} and the last are always made and none "
            "of the others lies within its window; take more steps, or widen low, high, start or "
            "stop.",
        )

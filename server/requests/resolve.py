"""From what a request says to what will be done: defaults filled in, everything checked."""

from __future__ import annotations

import secrets

from guidance import Always
from samplers import (
    FittedSampler,
    NoiseSchedule,
    Plan,
    PlanError,
    Sampler,
    Spacing,
    Statistics,
    StatisticsIdentity,
)
from server.errors import InvalidRequest
from server.models.hosted import HostedModel, ModelFacts
from server.requests.classifier_check import alternatives_of, check_classifier
from server.requests.group_check import check_group
from server.requests.guidance_check import check_guidance
from server.requests.schema import (
    COMPANY,
    DEFAULT_STEPS,
    GenerateRequest,
    ResolvedRequest,
    check_limits,
    default_guidance,
    default_sampler,
)
from server.settings import Limits

__all__ = ["make_plan", "resolve", "statistics_for"]


def resolve(
    request: GenerateRequest,
    model: HostedModel,
    limits: Limits,
    upload_size: tuple[int, int] | None,
) -> ResolvedRequest:
    """The request with every default filled in, and without the pictures that were sent.

    Args:
        request: as it came.
        model: that will serve it.
        limits: the operator's.
        upload_size: width and height of `image`, which they default to.

    Raises:
        InvalidRequest: the model, or the operator, does not allow something.
    """
    facts = model.facts
    width, height = upload_size or (facts.default_width, facts.default_height)
    sampler = request.sampler or default_sampler()
    defaults = {
        "model": facts.name,
        "width": width,
        "height": height,
        "steps": (request.spacing and request.spacing.own_steps) or DEFAULT_STEPS,
        "seed": secrets.randbelow(2**32),
        "sampler": sampler.model_dump(),
        "spacing": sampler.default_spacing,
        "guidance": default_guidance(sampler),
        "strength": _default_strength(request, upload_size is not None),
    }
    has_reference = request.reference is not None
    given = request.model_dump(exclude={"image", "mask", "reference"}, exclude_none=True)
    if negtome := given.get("guidance", {}).get("negtome"):
        negtome.setdefault("away_from", "reference" if has_reference else "first")
    resolved = ResolvedRequest.model_validate(defaults | given)
    check_limits(resolved, limits)
    check_guidance(resolved.guidance, model, has_picture=upload_size is not None)
    check_classifier(resolved, model)
    check_group(resolved, model, has_picture=upload_size is not None, has_reference=has_reference)
    _check_size(resolved, facts, limits)
    _check_tokens(resolved, model)
    return resolved


def statistics_for(resolved: ResolvedRequest, model: HostedModel) -> StatisticsIdentity | None:
    """The statistics of the model that the request's sampler is planned with; None if with none.

    Raises:
        InvalidRequest: it asks for statistics that there are not.
    """
    sampler, guidance = resolved.sampler, resolved.guidance
    if not isinstance(sampler, FittedSampler) or not sampler.uses_statistics:
        return None
    scale = getattr(guidance, "scale", 1.0)
    if sampler.statistics == "nearest":
        return model.statistics.nearest(scale)
    if guidance.name not in ("none", "cfg"):
        raise model.statistics.refusal(f"the rule {guidance.name!r}")
    plain = {"policy": Always(), "perturbed": ()}
    for field in COMPANY:
        if getattr(guidance, field) != plain.get(field):
            raise model.statistics.refusal(f"guidance with a {field} of its own")
    return model.statistics.exact(guidance.name, scale)


def make_plan(
    schedule: NoiseSchedule,
    sampler: Sampler,
    spacing: Spacing,
    steps: int,
    strength: float | None,
    statistics: Statistics | None = None,
) -> Plan:
    """The plan that every image of a request follows.

    Args:
        schedule: the model's.
        sampler: compiled to a table.
        spacing: how the steps are laid out.
        steps: of a run from nothing.
        strength: share of them that is run; None for all.
        statistics: of the model, at the latent's shape, for a sampler that takes them.

    Raises:
        InvalidRequest: they do not go together.
    """
    at_fault = "spacing"
    try:
        grid = schedule.grid(spacing, steps)
        grid = grid if strength is None else grid.tail(strength)
        at_fault = "sampler"
        if isinstance(sampler, FittedSampler):
            return sampler.plan(grid, statistics)
        return sampler.plan(grid)
    except PlanError as refusal:
        raise InvalidRequest(refusal.field, str(refusal)) from None
    except ValueError as refusal:
        # Samplers and spacings of other packages may not name the field.
        raise InvalidRequest(at_fault, str(refusal)) from None


def _default_strength(request: GenerateRequest, has_image: bool) -> float | None:
    if has_image:
        return 0.75 if request.mask is None else 1.0
    for field in ("strength", "mask"):
        if getattr(request, field) is not None:
            raise InvalidRequest(field, f"{field} needs an image; send one or leave {field} out.")
    return None


def _check_size(resolved: ResolvedRequest, facts: ModelFacts, limits: Limits) -> None:
    width, height = resolved.width, resolved.height
    for field, side in (("width", width), ("height", height)):
        if side % facts.size_multiple:
            raise InvalidRequest(
                field,
                f"{field} is {side}; model {facts.name!r} takes multiples of "
                f"{facts.size_multiple}.",
            )
    if width * height > limits.pixels:
        raise InvalidRequest(
            "width",
            f"width x height is {width} x {height}; at most {limits.pixels} pixels are allowed.",
        )


def _check_tokens(resolved: ResolvedRequest, model: HostedModel) -> None:
    told = [("prompt", resolved.prompt), ("negative_prompt", resolved.negative_prompt)]
    told += [("guidance", b.prompt) for b in resolved.guidance.branches if b.told == "own"]
    told += [("guidance.classifier", text) for text in alternatives_of(resolved, model)]
    for field, text in told:
        tokens = model.count_tokens(text or "")
        if tokens > model.facts.max_tokens:
            raise InvalidRequest(
                field,
                f"{field} has {tokens} tokens; model {model.facts.name!r} takes at most "
                f"{model.facts.max_tokens}.",
            )

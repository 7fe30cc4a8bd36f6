"""Resolution of requests: fills in defaults, runs the checks, and makes the plan of the images."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guidance.parts import PARTS
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
from server.errors import InvalidRequest, WeftError, failed_with
from server.models.hosted import HostedModel
from server.models.prompt_editing import Timeline
from server.requests.checks.cache import check_cache, check_cache_along
from server.requests.checks.classifier import check_classifier
from server.requests.checks.group import check_group, check_noise_of_particles
from server.requests.checks.guidance import check_guidance, check_windows, coefficients_for
from server.requests.checks.limits import check_limits, check_size, check_tokens
from server.requests.controls import check_controls, settings_of_controls
from server.requests.defaults import (
    guidance_for,
    guidance_with,
    override_guidance,
    own_defaults,
    sampler_for,
    spacing_for,
    steps_for,
)
from server.requests.embeddings import check_embeddings
from server.requests.hires import Hires
from server.requests.image_prompts import check_image_prompts
from server.requests.ineffective import warnings_for
from server.requests.prompt_editing import check_editing, timelines_of
from server.requests.reference_images import check_references
from server.requests.schema import (
    DEFAULT_RESIZE_MODE,
    GenerateRequest,
    Guidance,
    MaskContent,
    ResolvedRequest,
    guidance_of,
)
from server.requests.second_run import check_hires
from server.requests.start_noise import VariationChoice
from server.settings import Limits
from weft_plugins import FAILURES

__all__ = ["Prepared", "make_plan", "prepare", "resolve", "statistics_for"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A request that passed every check, with the data that its images share.

    Attributes:
        request: request with every default filled in.
        plan: plan of its sampler.
        coefficients: fitted coefficients of its guidance policy, ``[stages, n]``; None if it needs
            none.
        warnings: one sentence for each setting that has no effect or does not suit the model.
        timeline: rule by which times in its prompts are counted.
        notes: one sentence for each setting that was translated, and one about those that a
            distilled model's convention chose.
        second: second run, which draws the images at a larger size; None without `hires`.
    """

    request: ResolvedRequest
    plan: Plan
    coefficients: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    timeline: Timeline
    notes: tuple[str, ...] = ()
    second: Prepared | None = None


def resolve(
    request: GenerateRequest,
    model: HostedModel,
    limits: Limits,
    upload_size: tuple[int, int] | None,
    reference_size: tuple[int, int] | None = None,
) -> ResolvedRequest:
    """Fill in every default, and do all checks that do not need the plan, cheap ones first.

    Args:
        request: request as sent.
        model: model that will serve it.
        limits: limits set by the operator.
        upload_size: width and height of `image`, the default size of the result; None without one.
        reference_size: default size of the result by the first of `reference_images` if there is no
            `image`; None without one, or if it is not known yet.

    Returns:
        The request without the images that were sent.

    Raises:
        InvalidRequest: a value that the model or the operator does not allow.
    """
    has_picture, has_reference = upload_size is not None, request.reference is not None
    own = own_defaults(model, request.adapters)
    sampler = request.sampler or sampler_for(own)
    whole = model.default_schedule.whole_timesteps is not None
    spacing = request.spacing or spacing_for(own, sampler, request.steps, whole_timesteps=whole)
    guidance = request.guidance or guidance_for(own, sampler)
    if request.guidance is not None and request.reading.rule_left_out:
        guidance = guidance_with(guidance, guidance_for(own, sampler), model.facts.name)
    if own is not None and request.reading.habitual and not request.reading.composes:
        guidance = override_guidance(guidance, guidance_of(own.rule, own.policy), request.reading)
    default_size = model.facts.default_width, model.facts.default_height
    width, height = upload_size or reference_size or default_size
    width, height = request.width or width, request.height or height
    steps = request.steps or steps_for(own, spacing)
    # Every value was validated when the request was read.
    resolved = ResolvedRequest.model_construct(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        prompt_syntax=_prompt_syntax(request, model),
        clip_skip=_clip_skip(request, model),
        model=model.facts.name,
        autoencoder=_autoencoder(request, model),
        width=width,
        height=height,
        steps=steps,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        n=request.n,
        variation=_variation(request.variation),
        noise_size=request.noise_size,
        sampler=sampler,
        spacing=spacing,
        guidance=_with_source_to_avoid(guidance, has_reference=has_reference),
        cache=request.cache,
        adapters=request.adapters,
        controls=settings_of_controls(request.controls, model, habitual=request.reading.habitual),
        image_prompts=tuple(one.settings for one in request.image_prompts),
        reference_images=len(request.reference_images) or None,
        strength=_strength(request, steps, has_picture=has_picture),
        hires=_hires(request, width, height, steps, model),
        resize_mode=request.resize_mode,
        mask_content=_mask_content(request),
        output_format=request.output_format,
        stream=request.stream,
        priority=request.priority,
    )
    check_limits(resolved, limits)
    check_size(resolved, model.facts, limits)
    check_controls(resolved.controls, model)
    check_image_prompts(resolved.image_prompts, model)
    check_references(resolved.reference_images or 0, model.facts)
    check_hires(resolved, has_picture=has_picture, has_reference=has_reference)
    check_guidance(resolved.guidance, model, has_picture=has_picture)
    check_group(resolved, has_picture=has_picture, has_reference=has_reference)
    check_cache(resolved)
    has_upload = has_picture or has_reference or bool(resolved.controls)
    has_upload |= any(one.mask is not None for one in request.image_prompts)
    resolved = _with_resize_mode(resolved, has_upload=has_upload)
    check_classifier(resolved, model)
    check_editing(resolved)
    check_embeddings(resolved, model)
    check_tokens(resolved, model)
    return resolved


def prepare(resolved: ResolvedRequest, model: HostedModel, plan: Plan) -> Prepared:
    """Do the checks that depend on the plan, and look up the coefficients that were fitted to it.

    Args:
        resolved: request that was returned by :func:`resolve`.
        model: model that will serve it.
        plan: plan of its sampler.

    Raises:
        InvalidRequest: guidance or a cache cannot act along this plan, or guidance is not fitted to
            it.
    """
    check_windows(resolved.guidance, plan)
    check_noise_of_particles(resolved, plan)
    check_cache_along(resolved, plan)
    coefficients = coefficients_for(resolved, model, plan)
    warnings, timeline = warnings_for(resolved, model, plan), timelines_of(resolved)[0]
    return Prepared(resolved, plan, coefficients, warnings, timeline)


def statistics_for(resolved: ResolvedRequest, model: HostedModel) -> StatisticsIdentity | None:
    """Return which model statistics the request's sampler is planned with; None if it uses none.

    Raises:
        InvalidRequest: the sampler needs statistics that the model does not have.
    """
    sampler, guidance = resolved.sampler, resolved.guidance
    if not isinstance(sampler, FittedSampler) or not sampler.uses_statistics:
        return None
    scale = getattr(guidance, "scale", 1.0)
    if sampler.statistics == "nearest":
        return model.statistics.nearest(scale)
    if guidance.combines and not guidance.plain_cfg:
        raise model.statistics.refusal(f"the rule {guidance.name!r}")
    for part in PARTS:
        if getattr(guidance, part.field) != part.left_out:
            raise model.statistics.refusal(f"guidance with `{part.field}`")
    if any(one.weight for one in resolved.adapters):
        raise model.statistics.refusal("a request with `adapters`")
    if any(one.scale for one in resolved.controls):
        raise model.statistics.refusal("a request with `controls`")
    if any(one.scale for one in resolved.image_prompts):
        raise model.statistics.refusal("a request with `image_prompts`")
    if resolved.reference_images:
        raise model.statistics.refusal("a request with `reference_images`")
    return model.statistics.exact("cfg" if guidance.combines else "none", scale)


def make_plan(
    schedule: NoiseSchedule,
    sampler: Sampler,
    spacing: Spacing,
    steps: int,
    strength: float | None,
    statistics: Statistics | None = None,
) -> Plan:
    """Make the plan that all images of a request follow.

    Args:
        schedule: noise schedule of the model.
        sampler: sampler that makes the plan.
        spacing: spacing, which places the steps at noise levels.
        steps: number of steps of a run from pure noise.
        strength: share of the steps that is run; None for all.
        statistics: model statistics at the latent's shape, for a sampler that uses them.

    Raises:
        InvalidRequest: the arguments are incompatible.
        WeftError: the spacing or the sampler failed in another way.
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
    except FAILURES as error:
        name = spacing.name if at_fault == "spacing" else sampler.name
        log.exception("the %s %s failed", at_fault, name)
        raise WeftError(failed_with(f"The {at_fault} {name!r}", error)) from error


def _with_source_to_avoid(guidance: Guidance, *, has_reference: bool) -> Guidance:
    """Return the guidance with the source of negative token merging filled in."""
    negtome = guidance.negtome
    if negtome is None or negtome.away_from is not None:
        return guidance
    source = "reference" if has_reference else "first"
    return guidance.model_copy(update={"negtome": negtome.model_copy(update={"away_from": source})})


def _with_resize_mode(resolved: ResolvedRequest, *, has_upload: bool) -> ResolvedRequest:
    if has_upload:
        mode = resolved.resize_mode or DEFAULT_RESIZE_MODE
        return resolved.model_copy(update={"resize_mode": mode})
    if resolved.resize_mode is not None:
        raise InvalidRequest(
            "resize_mode", "resize_mode needs an image; send one or leave resize_mode out."
        )
    return resolved


def _prompt_syntax(request: GenerateRequest, model: HostedModel) -> Literal["automatic1111"] | None:
    if request.prompt_syntax is None or model.weighs_prompts:
        return request.prompt_syntax
    if request.reading.habitual:
        return None
    raise InvalidRequest(
        "prompt_syntax",
        f"prompt_syntax is {request.prompt_syntax!r}, but model {model.facts.name!r} reads prompts "
        "as plain text; leave it out.",
    )


def _clip_skip(request: GenerateRequest, model: HostedModel) -> int | None:
    skip, allowed = request.clip_skip, model.facts.clip_skips
    if skip is None or skip in allowed:
        return skip
    if allowed:
        raise InvalidRequest(
            "clip_skip",
            f"clip_skip is {skip}; model {model.facts.name!r} takes {allowed[0]} to {allowed[-1]}, "
            f"and {allowed[0]} is its own.",
        )
    if request.reading.habitual:
        return None
    raise InvalidRequest(
        "clip_skip",
        f"clip_skip is {skip}, but model {model.facts.name!r} reads no hidden states of a CLIP "
        "text encoder; leave it out.",
    )


def _autoencoder(request: GenerateRequest, model: HostedModel) -> Literal["tiny"] | None:
    if request.autoencoder == "full":
        return None
    if model.tiny is None:
        raise InvalidRequest(
            "autoencoder",
            f"autoencoder is 'tiny', but model {model.facts.name!r} is hosted without a tiny "
            "autoencoder; leave it out.",
        )
    return "tiny"


def _variation(asked: VariationChoice | None) -> VariationChoice | None:
    if asked is None or asked.seed is not None:
        return asked
    return asked.model_copy(update={"seed": secrets.randbelow(2**32)})


def _hires(
    request: GenerateRequest, width: int, height: int, steps: int, model: HostedModel
) -> Hires | None:
    if request.hires is None:
        return None
    return request.hires.filled_in(width, height, steps, model.facts.size_multiple)


def _mask_content(request: GenerateRequest) -> MaskContent | None:
    if request.mask is not None:
        return request.mask_content or "original"
    if request.mask_content is not None:
        raise InvalidRequest(
            "mask_content", "mask_content needs a mask; send one or leave mask_content out."
        )
    return None


def _strength(request: GenerateRequest, steps: int, *, has_picture: bool) -> float | None:
    if has_picture:
        # A single step is run completely or not at all.
        default = 0.75 if request.mask is None and steps > 1 else 1.0
        return default if request.strength is None else request.strength
    for field in ("strength", "mask"):
        if getattr(request, field) is not None:
            raise InvalidRequest(field, f"{field} needs an image; send one or leave {field} out.")
    return None

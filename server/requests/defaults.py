"""Defaults of fields that a request leaves out: the model's own, or else the server's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samplers import Trailing
from server.errors import InvalidRequest
from server.requests.adapters import check_adapters
from server.requests.schema import (
    DEFAULT_STEPS,
    SPACING_BY_NAME,
    default_guidance,
    default_sampler,
    guidance_of,
    merged,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers import Sampler, Spacing
    from server.models.defaults import ModelDefaults
    from server.models.hosted import HostedModel
    from server.requests.adapters import WeightedName
    from server.requests.reading import Reading
    from server.requests.schema import Guidance

__all__ = [
    "guidance_for",
    "guidance_with",
    "override_guidance",
    "own_defaults",
    "sampler_for",
    "spacing_for",
    "steps_for",
]


def own_defaults(model: HostedModel, adapters: Sequence[WeightedName] = ()) -> ModelDefaults | None:
    """Return the defaults that a model with adapters is made for; None for the server's.

    Args:
        model: model that will serve the request.
        adapters: adapters of the request. An adapter that was made for few steps brings its own
            defaults unless its weight is 0; of several such, the last one counts.

    Raises:
        InvalidRequest: :func:`check_adapters` refuses the adapters.
    """
    files = check_adapters(adapters, model)
    brought = [
        file.defaults
        for file, one in zip(files, adapters, strict=True)
        if file.defaults is not None and one.weight
    ]
    return brought[-1] if brought else model.facts.defaults


def sampler_for(own: ModelDefaults | None) -> Sampler:
    """Return the sampler of a request that leaves it out.

    Args:
        own: defaults of the model; None if it has none.
    """
    return default_sampler() if own is None else own.sampler


def spacing_for(
    own: ModelDefaults | None,
    sampler: Sampler,
    steps: int | None = None,
    *,
    whole_timesteps: bool = True,
) -> Spacing:
    """Return the spacing of a request that leaves it out.

    Args:
        own: defaults of the model; None if it has none.
        sampler: sampler of the request. If it is not the model's default, it keeps its own spacing;
            if that has the name of the model's spacing, the model's parameters are used.
        steps: number of steps of the request; None if it leaves it out.
        whole_timesteps: whether the model was trained at whole timesteps only. For other models
            ``trailing`` replaces a spacing that needs whole timesteps.
    """
    named = sampler.default_spacing
    if not whole_timesteps and SPACING_BY_NAME[named].needs_whole_timesteps:
        named = Trailing().name
    if own is not None and (sampler.name == own.sampler.name or named == own.spacing.name):
        return own.spacing_of(steps)
    return SPACING_BY_NAME[named].model_validate({})


def steps_for(own: ModelDefaults | None, spacing: Spacing) -> int:
    """Return the number of steps of a request that leaves it out.

    Args:
        own: defaults of the model; None if it has none.
        spacing: spacing of the request, which may prescribe the number.
    """
    return spacing.own_steps or (DEFAULT_STEPS if own is None else own.steps)


def guidance_for(own: ModelDefaults | None, sampler: Sampler) -> Guidance:
    """Return the guidance of a request that leaves it out.

    Args:
        own: defaults of the model; None if it has none.
        sampler: sampler of the request.
    """
    if own is None:
        return default_guidance(sampler)
    return guidance_of(own.rule, own.policy, own.cfg_norm)


def guidance_with(given: Guidance, default: Guidance, model: str) -> Guidance:
    """Return the guidance of a request that sets fields of it but names no rule.

    Args:
        given: guidance as validated, with a rule that the request does not name.
        default: guidance that the request would get without these fields.
        model: name of the model, for the error.

    Raises:
        InvalidRequest: the default's rule does not have one of the fields.
    """
    fields = given.model_fields_set - {"name"}
    if not default.combines and getattr(given, "scale", None) in (0, 1):
        # For a distilled model that is sampled without guidance, both mean no guidance.
        fields -= {"scale"}
    for field in sorted(fields):
        if field not in type(default).model_fields:
            raise InvalidRequest(
                f"guidance.{field}",
                f"guidance has {field} but no name, and the default for model {model!r} is "
                f"{default.name!r}, which has no {field}; name a rule, or leave {field} out.",
            )
    return merged(default, given, fields)


def override_guidance(given: Guidance, own: Guidance, reading: Reading) -> Guidance:
    """Return the guidance of a request whose client sends a scale regardless of the model.

    Args:
        given: classifier-free guidance at that scale, or none.
        own: guidance that the model was distilled for.
        reading: reading of the request, with the scale for models that take one as an input.
    """
    if own.policy.embeds and reading.distilled_scale is not None:
        return own.model_copy(update={"scale": reading.distilled_scale})
    if not own.combines:
        return own
    if own.policy.embeds:
        return merged(own, given, {"scale"}) if given.combines else own
    return merged(own, given, {"scale"}) if given.combines else given

"""Finds out how a model folder is to be sampled: the operator says it, or its configs tell it."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guidance import CFG
from samplers import LCMSpacing
from samplers.names import of_diffusers
from server.errors import ModelMismatch
from server.models.conventions import CONVENTIONS, defaults_by, numbers
from server.models.folder import DERIVED, read_json
from server.models.unet_model import SCHEDULER
from server.wording import demand_of, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from server.models.defaults import ModelDefaults

__all__ = ["STATED", "distilled_as", "distilled_spacing", "is_called_turbo", "stated"]

logger = logging.getLogger(__name__)

STATED: Final = f"{DERIVED}/defaults.json"
"""Where an operator may name the convention of a model folder."""

TURBO: Final = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)


class _Stated(BaseModel):
    """What an operator may say of a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    convention: str
    steps: Annotated[int, Field(ge=1)] | None = None
    scale: Annotated[float, Field(ge=1, le=20)] | None = None


def stated(
    folder: Path, scheduler: Mapping[str, Any], *, embeds_scale: bool, flow: bool = False
) -> ModelDefaults | None:
    """The convention that the operator names in the folder; None where there is no such file.

    Args:
        folder: of the model.
        scheduler: its scheduler's config, which has the times of a convention of spacing ``lcm``.
        embeds_scale: whether its denoiser is told a guidance scale.
        flow: whether it is a flow-matching model.

    Raises:
        ModelMismatch: the file says something else, names a convention that is not known or is
            not for such a model, a number of steps that the convention or the scheduler has not,
            or a guidance scale that nothing is told.
    """
    if not (folder / STATED).exists():
        return None
    where = f"{STATED} of model folder {str(folder)!r}"
    try:
        said = _Stated.model_validate(read_json(folder, STATED))
    except ValidationError as error:
        raise ModelMismatch(f"{where} {_explained(error)}.") from None
    if said.convention not in CONVENTIONS:
        raise ModelMismatch(
            f"{where} names the convention {said.convention[:40]!r}; allowed are "
            f"{', '.join(CONVENTIONS)}."
        )
    convention = CONVENTIONS[said.convention]
    if convention.flow is not flow:
        theirs = "flow-matching models" if convention.flow else "models that predict noise"
        raise ModelMismatch(
            f"{where} names the convention {said.convention!r}, which is for {theirs}; "
            f"this one {'matches a flow' if flow else 'predicts noise'}."
        )
    if convention.policy.embeds and not embeds_scale:
        lacks = "guidance_embeds" if flow else "time_cond_proj_dim"
        raise ModelMismatch(
            f"{where} names the convention {said.convention!r}, for models that are told a "
            f"guidance scale; this one has no {lacks}."
        )
    counts = convention.counts
    if said.steps is None and convention.weights_of_counts:
        raise ModelMismatch(
            f"{where} names the convention {said.convention!r}, whose weights are for one number "
            f"of steps each; add steps, which is {numbers(counts)}."
        )
    if said.steps is not None and counts and said.steps not in counts:
        raise ModelMismatch(
            f"{where} has the steps {said.steps}; models of the convention {said.convention!r} are "
            f"distilled for {numbers(counts)}."
        )
    if said.scale is not None and not convention.policy.embeds:
        raise ModelMismatch(
            f"{where} has the scale {said.scale:g}; models of the convention {said.convention!r} "
            "are told none."
        )
    steps, spacing = said.steps, None
    if convention.spacing.name == "lcm":
        spacing = distilled_spacing(folder, scheduler)
        steps = _steps_within(spacing.distilled_steps, said, where)
    return defaults_by(
        said.convention,
        f"{STATED} in its folder says so",
        steps=steps,
        spacing=spacing,
        rule=None if said.scale is None else CFG(scale=said.scale),
    )


def _explained(refusal: ValidationError) -> str:
    """The first thing that is wrong with the file, as a clause."""
    error = refusal.errors()[0]
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f"has no {field}; allowed are {', '.join(CONVENTIONS)}"
    if error["type"] == "extra_forbidden":
        known = ", ".join(_Stated.model_fields)
        return f"has the field {shown(field)}, which is not known; allowed are {known}"
    return f"has the {field} {shown(error['input'])}; it {demand_of(error)}"


def _steps_within(most: int, said: _Stated, where: str) -> int:
    if said.steps is None:
        return min(CONVENTIONS[said.convention].steps, most)
    if said.steps > most:
        raise ModelMismatch(
            f"{where} has the steps {said.steps}; at most {most} are allowed, the "
            f"original_inference_steps of its {SCHEDULER}."
        )
    return said.steps


def distilled_spacing(folder: Path, scheduler: Mapping[str, Any]) -> LCMSpacing:
    """The times that a consistency model was distilled at, by its scheduler's config.

    Args:
        folder: of the model.
        scheduler: the config. Those written before ``original_inference_steps`` existed leave it
            out, which is 50.

    Raises:
        ModelMismatch: the entry is no number of steps that the spacing has.
    """
    distilled = scheduler.get("original_inference_steps", 50)
    allowed = LCMSpacing.model_json_schema()["properties"]["distilled_steps"]
    if type(distilled) is not int or not allowed["minimum"] <= distilled <= allowed["maximum"]:
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the original_inference_steps "
            f"{str(distilled)[:40]!r}; a whole number from {allowed['minimum']} to "
            f"{allowed['maximum']} is allowed."
        )
    return LCMSpacing(distilled_steps=distilled)


def distilled_as(
    folder: Path, scheduler: Mapping[str, Any], *, embeds_scale: bool
) -> ModelDefaults | None:
    """How a model of a U-Net was made to be sampled; None where nothing says so.

    What the operator states counts first, then the class of the scheduler, then a name, then zero
    terminal SNR.

    Args:
        folder: of the model.
        scheduler: its scheduler's config.
        embeds_scale: whether its U-Net is told a guidance scale.

    Raises:
        ModelMismatch: what the operator states is refused, see :func:`stated`.
    """
    if said := stated(folder, scheduler, embeds_scale=embeds_scale):
        return said
    told = _distilled_by_scheduler(folder, scheduler, embeds_scale=embeds_scale)
    if told is None and is_zero_snr(scheduler):
        return defaults_by("zero_snr", "rescale_betas_zero_snr of its scheduler is true")
    return told


def is_zero_snr(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of a model that starts from noise alone."""
    of_velocity = scheduler.get("prediction_type") == "v_prediction"
    return of_velocity and bool(scheduler.get("rescale_betas_zero_snr"))


def _distilled_by_scheduler(
    folder: Path, scheduler: Mapping[str, Any], *, embeds_scale: bool
) -> ModelDefaults | None:
    match scheduler.get("_class_name"):
        case "LCMScheduler":
            if embeds_scale:
                reason = "its scheduler is an LCMScheduler and its U-Net is told a guidance scale"
                return _by_config("lcm", reason, scheduler)
            return _by_config("lcm_lora", "its scheduler is an LCMScheduler", scheduler)
        case "TCDScheduler":
            return _by_config("tcd", "its scheduler is a TCDScheduler", scheduler)
        case "EulerDiscreteScheduler" | "EulerAncestralDiscreteScheduler" as kind:
            trailing = scheduler.get("timestep_spacing") == "trailing"
            of_noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
            if not (trailing and of_noise and is_called_turbo(folder, "unet")):
                return None
            ancestral = kind == "EulerAncestralDiscreteScheduler"
            reason = "its configs are named after a Turbo model, and its scheduler is trailing"
            return defaults_by("sdxl_turbo" if ancestral else "sd_turbo", reason)
        case _:
            return None


def _by_config(name: str, reason: str, scheduler: Mapping[str, Any]) -> ModelDefaults | None:
    """The defaults over the times that the config says; none where no sampler here is equal."""
    try:
        _, spacing = of_diffusers(scheduler)
    except ValueError as refusal:
        logger.warning("the scheduler's config is not followed: %s", refusal)
        return None
    most = spacing.model_dump()["distilled_steps"]
    return defaults_by(name, reason, spacing=spacing, steps=min(CONVENTIONS[name].steps, most))


def is_called_turbo(folder: Path, denoiser: str) -> bool:
    """Whether the path that diffusers noted of the original has the word turbo in it.

    Args:
        folder: of the model.
        denoiser: its name in the folder.
    """
    configs = (read_json(folder, name) for name in ("model_index.json", f"{denoiser}/config.json"))
    return any(TURBO.search(str(config.get("_name_or_path", ""))) for config in configs)

"""Determines how a model folder is sampled, from the operator's statement or from its configs."""

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

__all__ = ["STATED", "distilled_as", "distilled_spacing", "has_turbo_name", "stated"]

logger = logging.getLogger(__name__)

STATED: Final = f"{DERIVED}/defaults.json"
"""File in which an operator may state the convention of a model folder."""

TURBO: Final = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)


class _FolderOverride(BaseModel):
    """What an operator may state about a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    convention: str
    steps: Annotated[int, Field(ge=1)] | None = None
    scale: Annotated[float, Field(ge=1, le=20)] | None = None


def stated(
    folder: Path, scheduler: Mapping[str, Any], *, embeds_scale: bool, flow: bool = False
) -> ModelDefaults | None:
    """The convention that the operator states in the folder; None if there is no such file.

    Args:
        folder: model folder.
        scheduler: its scheduler's config, which has the times of a convention with spacing ``lcm``.
        embeds_scale: whether its denoiser takes a guidance scale as input.
        flow: whether it is a flow-matching model.

    Raises:
        ModelMismatch: the file has unknown content, or states a convention that is unknown or not
            for such a model, a number of steps that the convention or the scheduler does not
            allow, or a guidance scale for a convention whose models take none.
    """
    if not (folder / STATED).exists():
        return None
    where = f"{STATED} of model folder {str(folder)!r}"
    try:
        said = _FolderOverride.model_validate(read_json(folder, STATED))
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
            f"{where} names the convention {said.convention!r}, for models with a guidance scale "
            f"as an input; this one has no {lacks}."
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
            "do not take one."
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
    """The first error in the file, as a clause."""
    error = refusal.errors()[0]
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f"has no {field}; allowed are {', '.join(CONVENTIONS)}"
    if error["type"] == "extra_forbidden":
        known = ", ".join(_FolderOverride.model_fields)
        return f"has the field {shown(field)}, which is unknown; allowed are {known}"
    return f"has the {field} {shown(error['input'])}; it {demand_of(error)}"


def _steps_within(max_steps: int, said: _FolderOverride, where: str) -> int:
    if said.steps is None:
        return min(CONVENTIONS[said.convention].steps, max_steps)
    if said.steps > max_steps:
        raise ModelMismatch(
            f"{where} has the steps {said.steps}; at most {max_steps} are allowed, the "
            f"original_inference_steps of its {SCHEDULER}."
        )
    return said.steps


def distilled_spacing(folder: Path, scheduler: Mapping[str, Any]) -> LCMSpacing:
    """The times that a consistency model was distilled at, from its scheduler's config.

    Args:
        folder: model folder.
        scheduler: the config. If it was written before ``original_inference_steps`` existed and
            lacks the entry, the value is 50.

    Raises:
        ModelMismatch: the entry is not a number of steps that the spacing allows.
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
    """How a U-Net model is meant to be sampled; None where nothing indicates it.

    In order of precedence: the operator's statement, the class of the scheduler, the model's name,
    zero terminal SNR.

    Args:
        folder: model folder.
        scheduler: its scheduler's config.
        embeds_scale: whether its U-Net takes a guidance scale as input.

    Raises:
        ModelMismatch: the operator's statement is refused, see :func:`stated`.
    """
    if said := stated(folder, scheduler, embeds_scale=embeds_scale):
        return said
    defaults = _distilled_by_scheduler(folder, scheduler, embeds_scale=embeds_scale)
    if defaults is None and is_zero_snr(scheduler):
        return defaults_by("zero_snr", "rescale_betas_zero_snr of its scheduler is true")
    return defaults


def is_zero_snr(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of a model that starts from pure noise."""
    of_velocity = scheduler.get("prediction_type") == "v_prediction"
    return of_velocity and bool(scheduler.get("rescale_betas_zero_snr"))


def _distilled_by_scheduler(
    folder: Path, scheduler: Mapping[str, Any], *, embeds_scale: bool
) -> ModelDefaults | None:
    match scheduler.get("_class_name"):
        case "LCMScheduler":
            if embeds_scale:
                reason = (
                    "its scheduler is an LCMScheduler and its U-Net takes a guidance scale as an "
                    "input"
                )
                return _by_config("lcm", reason, scheduler)
            return _by_config("lcm_lora", "its scheduler is an LCMScheduler", scheduler)
        case "TCDScheduler":
            return _by_config("tcd", "its scheduler is a TCDScheduler", scheduler)
        case "EulerDiscreteScheduler" | "EulerAncestralDiscreteScheduler" as kind:
            trailing = scheduler.get("timestep_spacing") == "trailing"
            of_noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
            if not (trailing and of_noise and has_turbo_name(folder, "unet")):
                return None
            ancestral = kind == "EulerAncestralDiscreteScheduler"
            reason = "its configs are named after a Turbo model, and its scheduler is trailing"
            return defaults_by("sdxl_turbo" if ancestral else "sd_turbo", reason)
        case _:
            return None


def _by_config(name: str, reason: str, scheduler: Mapping[str, Any]) -> ModelDefaults | None:
    """The defaults with the config's times; None where no sampler here is equivalent."""
    try:
        _, spacing = of_diffusers(scheduler)
    except ValueError as refusal:
        logger.warning("the scheduler's config is not followed: %s", refusal)
        return None
    max_steps = spacing.model_dump()["distilled_steps"]
    return defaults_by(name, reason, spacing=spacing, steps=min(CONVENTIONS[name].steps, max_steps))


def has_turbo_name(folder: Path, denoiser: str) -> bool:
    """Whether the original path that diffusers recorded contains the word turbo.

    Args:
        folder: model folder.
        denoiser: name of the denoiser in the folder.
    """
    configs = (read_json(folder, name) for name in ("model_index.json", f"{denoiser}/config.json"))
    return any(TURBO.search(str(config.get("_name_or_path", ""))) for config in configs)

"""Translation of AUTOMATIC1111's hires fix into Weft's second run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidRequest
from server.requests.hires import UPSCALER_LABELS, Upscaler
from server.requests.schema import DEFAULT_STEPS

__all__ = [
    "LATENT_UPSCALERS",
    "MIN_STEPS",
    "UPSCALERS",
    "HiresFields",
    "different",
    "hires",
    "written",
]

UPSCALERS: Final = ("None", UPSCALER_LABELS["lanczos"])
"""Upscalers for pixels. Both are Lanczos, which AUTOMATIC1111 uses if no upscaler is chosen."""

LATENT_UPSCALERS: Final = tuple(
    label for label in UPSCALER_LABELS.values() if label not in UPSCALERS
)
"""Upscalers for latents, AUTOMATIC1111's default first."""

_UPSCALERS: Final[Mapping[str, Upscaler]] = {
    "None": "lanczos",
    **{label: name for name, label in UPSCALER_LABELS.items()},
}

MIN_STEPS: Final = 1.001
"""Minimum number of steps run from an image, even with a strength of 0."""

DEFAULT_STRENGTH: Final = 0.75

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "hr_cfg": (0, 1),
}
"""Fields that the second run takes from the first one here, and their neutral values."""

_FIRST: Final = {
    "hr_sampler_name": "sampler_name",
    "hr_scheduler": "scheduler",
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
    "hr_cfg": "cfg_scale",
}

_OF_INFOTEXT: Final[Mapping[str, str]] = {
    "hr_scale": "Hires upscale",
    "hr_resize_x": "Hires resize-1",
    "hr_resize_y": "Hires resize-2",
    "hr_second_pass_steps": "Hires steps",
    "hr_upscaler": "Hires upscaler",
}


class HiresFields(BaseModel):
    """The fields of a second run."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    enable_hr: bool = Field(
        default=False, description="Whether each image is enlarged and drawn a second time."
    )
    hr_scale: float = Field(default=2, ge=1, le=8, description="Factor for width and height.")
    hr_resize_x: int = Field(
        default=0, ge=0, le=16384, description="Width to use instead of the factor; 0 is unset."
    )
    hr_resize_y: int = Field(
        default=0, ge=0, le=16384, description="Height to use instead of the factor; 0 is unset."
    )
    hr_upscaler: str = Field(
        default=LATENT_UPSCALERS[0],
        max_length=128,
        description="How each image is enlarged: a name in `upscalers` or `latent-upscale-modes`.",
    )
    hr_second_pass_steps: int = Field(
        default=0, ge=0, description="Steps of the second run; 0 is as many as in the first."
    )
    hr_checkpoint_name: str = ""
    hr_sampler_name: str = ""
    hr_scheduler: str = ""
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_cfg: float = 1


def hires(
    fields: HiresFields,
    size: tuple[int, int],
    steps: int | None,
    denoising_strength: float | None,
    multiple: int,
) -> dict[str, Any]:
    """Return Weft's field `hires`; empty without a second run.

    Args:
        fields: fields as sent.
        size: width and height of the first run.
        steps: steps of the first run.
        denoising_strength: strength as sent.
        multiple: multiple of pixels that the model needs for width and height; sizes are rounded
            down to it, as in AUTOMATIC1111.

    Raises:
        InvalidRequest: the upscaler is unknown.
    """
    if not fields.enable_hr:
        return {}
    upscaler = _UPSCALERS.get(fields.hr_upscaler)
    if upscaler is None:
        raise InvalidRequest(
            "hr_upscaler",
            f"hr_upscaler is {fields.hr_upscaler!r}; allowed are: {', '.join(_UPSCALERS)}.",
        )
    asked = DEFAULT_STRENGTH if denoising_strength is None else denoising_strength
    least = MIN_STEPS / (fields.hr_second_pass_steps or steps or DEFAULT_STEPS)
    made: dict[str, Any] = {"strength": min(1.0, max(asked, least)), "upscaler": upscaler}
    if fields.hr_second_pass_steps:
        made["steps"] = fields.hr_second_pass_steps
    width, height = fields.hr_resize_x, fields.hr_resize_y
    if width and height:
        wide, high = (max(side - side % multiple, multiple) for side in (width, height))
        return {"hires": {**made, "width": wide, "height": high}}
    scale = max(width / size[0], height / size[1]) or fields.hr_scale
    return {"hires": {**made, "scale": scale}}


def different(fields: HiresFields) -> list[str]:
    """Return the names of set fields that differ from the first run, whose values are used."""
    return [
        name
        for name, neutral in _NEUTRAL.items()
        if (told := getattr(fields, name)) not in neutral
        and told != getattr(fields, _FIRST.get(name, ""), None)
    ]


def written(infotext: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a second run that an infotext contains; empty if it has none."""
    found = {ours: infotext[name] for ours, name in _OF_INFOTEXT.items() if name in infotext}
    return found | {"enable_hr": "true"} if found else {}

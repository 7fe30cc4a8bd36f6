"""Translation of units of AUTOMATIC1111's ControlNet extension into `controls` and `image_prompts`.

The extension is https://github.com/Mikubill/sd-webui-controlnet (internal_controlnet/args.py);
Forge has the same API. Clients send units as arguments of the script `controlnet`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.decoding.sizing import ResizeMode
from server.errors import InvalidRequest
from server.models.controls.control import Precedence
from server.requests.controls import PRECEDENCE_LABELS, RESIZE_LABELS, STRONGEST
from server.requests.upload import Upload

__all__ = [
    "MODULES",
    "ControlNetUnit",
    "TranslatedUnits",
    "is_controlnet",
    "module_of",
    "translate_units",
    "units_in",
]

IP_ADAPTER: Final = "ip-adapter-auto"

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "none": ("", "none"),
    "invert": ("invert", "invert (from white bg & black line)"),
    IP_ADAPTER: (
        IP_ADAPTER,
        "ip-adapter_clip_h",
        "ip-adapter_clip_g",
        "ip-adapter_clip_sd15",
        "ip-adapter_clip_sdxl",
        "ip-adapter_clip_sdxl_plus_vith",
        "clip-vit-h (ipadapter)",
        "clip-vit-bigg (ipadapter)",
    ),
}
"""Supported preprocessors, with their names in the extension and in Forge. Those for IP-Adapters
name an image encoder; here each adapter has its own."""

_SUFFIX: Final = re.compile(r" \[[0-9a-fA-F]+\]$")
"""Hash that the extension appends to the name of a model."""

_OTHER_NAMES: Final = {
    "input_image": "image",
    "guidance": "guidance_end",
    "mask_image": "mask",
}
"""Names of fields in earlier versions and in Forge."""

_OTHER_LABELS: Final = {
    "Inner Fit (Scale to Fit)": "Crop and Resize",
    "Scale to Fit (Inner Fit)": "Crop and Resize",
    "Outer Fit (Shrink to Fit)": "Resize and Fill",
    "Envelope (Outer Fit)": "Resize and Fill",
}
"""Names of resize modes in earlier versions."""

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "hr_option": ("Both", "HiResFixOption.BOTH", 0),
    "union_control_type": ("Unknown",),
    "inpaint_crop_input_image": (True,),
    "mask": (False,),
    "effective_region_mask": (None,),
    "advanced_weighting": (False,),
    "ipadapter_input": (False,),
}
"""Fields of a unit without an equivalent here, and their neutral values."""

_OF_CONTROLS: Final = ("effective_region_mask",)
"""Fields without an equivalent only in units with a ControlNet: IP-Adapters have a region here
too."""

_LARGE: Final = ("mask", "advanced_weighting", "ipadapter_input")
"""Fields that may be large and of which only the presence counts."""


_OFF: Final = ("", "0", "f", "false", "n", "no", "none", "off")
"""Texts that mean that a switch is off."""


def _mode_of(value: Any) -> Any:
    """Return Weft's resize mode for a label or number of the extension."""
    labels = tuple(RESIZE_LABELS.values())
    label = _OTHER_LABELS.get(value, value) if isinstance(value, str) else value
    for number, (mode, own) in enumerate(RESIZE_LABELS.items()):
        if label == own or (type(label) is int and label == number):
            return mode
    raise ValueError(f"must be one of {', '.join(map(repr, labels))}")


def _precedence_of(value: Any) -> Precedence | None:
    """Return the precedence for a label or number of a control mode of the extension."""
    for number, (precedence, label) in enumerate(PRECEDENCE_LABELS.items()):
        if value == label or (type(value) in (int, str) and str(value) == str(number)):
            return precedence
    raise ValueError(f"must be one of {', '.join(map(repr, PRECEDENCE_LABELS.values()))}")


class ControlNetUnit(BaseModel):
    """An enabled unit of the extension; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    image: Upload | None = Field(
        default=None,
        repr=False,
        description="Input picture in base64. Default: for `img2img`, the image to start from.",
    )
    model: str = Field(
        default="None",
        max_length=256,
        description="A ControlNet or IP-Adapter of the model, with or without a hash.",
    )
    module: str = Field(
        default="none", max_length=128, description="Preprocessor: `none` or `invert`."
    )
    weight: float = Field(default=1, ge=0, le=STRONGEST, description="Factor on its effect.")
    guidance_start: float = Field(
        default=0, ge=0, le=1, description="Share of the run after which it begins to act."
    )
    guidance_end: float = Field(
        default=1, ge=0, le=1, description="Share of the run after which it no longer acts."
    )
    resize_mode: Annotated[ResizeMode, BeforeValidator(_mode_of)] = Field(
        default="crop", description="`Just Resize`, `Crop and Resize` or `Resize and Fill`, or 0-2."
    )
    effective_region_mask: Upload | None = Field(
        default=None,
        repr=False,
        description="Mask of an IP-Adapter in base64: white where it acts.",
    )
    control_mode: Annotated[Precedence | None, BeforeValidator(_precedence_of)] = Field(
        default=None,
        description="`Balanced`, `My prompt is more important`, `ControlNet is more important`, "
        "or 0-2. An IP-Adapter has none.",
    )
    hr_option: str | int = "Both"
    union_control_type: str = "Unknown"
    inpaint_crop_input_image: bool = True
    mask: bool = False
    advanced_weighting: bool = False
    ipadapter_input: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Drop fields that are null."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _check_window(self) -> ControlNetUnit:
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start is {self.guidance_start:g}; it must be less than guidance_end, "
                f"{self.guidance_end:g}"
            )
        return self


def is_controlnet(script: Any) -> bool:
    """Return whether a script is the extension, by its name."""
    return str(script).casefold() == "controlnet"


def units_in(scripts: Any) -> list[dict[str, Any]]:
    """Return the enabled units, without large fields that are not used.

    A unit without the field `enabled` is enabled, as in Forge and earlier versions.

    Args:
        scripts: `alwayson_scripts` as it was sent.

    Raises:
        InvalidRequest: `scripts` is not an object, or a unit has several pictures.
    """
    if scripts and not isinstance(scripts, dict):
        raise InvalidRequest("alwayson_scripts", "alwayson_scripts must be an object.")
    found = [one for name, one in scripts.items() if is_controlnet(name)] if scripts else []
    arguments = found[0].get("args") if found and isinstance(found[0], dict) else None
    sent = arguments if isinstance(arguments, list) else [arguments]
    units = [one for one in sent if isinstance(one, dict) and one]
    return [_narrowed(i, one) for i, one in enumerate(units) if _is_on(one.get("enabled", True))]


def _is_on(enabled: Any) -> bool:
    """Return whether a unit is enabled; texts count as pydantic reads them in the extension."""
    return str(enabled).casefold() not in _OFF


def _narrowed(place: int, sent: Mapping[str, Any]) -> dict[str, Any]:
    # If a field is sent by two names, a null value of one is ignored.
    present = {name: value for name, value in sent.items() if value is not None}
    unit = {_OTHER_NAMES.get(name, name): value for name, value in present.items()}
    image = unit.get("image")
    if isinstance(image, list) and len(image) == 2 and all(isinstance(one, str) for one in image):
        image = dict(zip(("image", "mask"), image, strict=True))
    if isinstance(image, list) and len(image) == 1:
        [image] = image
    if isinstance(image, list):
        raise InvalidRequest(
            f"controlnet.{place}.image",
            f"controlnet.{place}.image has {len(image)} pictures; send a unit for each of them.",
        )
    if isinstance(image, dict):
        unit["mask"] = unit.get("mask") or image.get("mask")
        image = image.get("image")
    unit["image"] = image or None
    unit["effective_region_mask"] = unit.get("effective_region_mask") or None
    unit |= {name: bool(unit.get(name)) for name in _LARGE}
    return {name: unit[name] for name in ControlNetUnit.model_fields if name in unit}


def module_of(name: str) -> str | None:
    """Return the preprocessor of `MODULES` with a given name; None if there is none."""
    wanted = name.strip().casefold()
    return next((ours for ours, names in MODULES.items() if wanted in names), None)


@dataclass(frozen=True, slots=True)
class TranslatedUnits:
    """The translation of units.

    Attributes:
        fields: fields `controls` and `image_prompts`, if not empty.
        ignored: names of set fields that have no equivalent here.
    """

    fields: Mapping[str, Sequence[Mapping[str, Any]]]
    ignored: Sequence[str]


def translate_units(
    units: Sequence[ControlNetUnit],
    start: Upload | None,
    start_mode: ResizeMode | None,
    controls: Collection[str] | None,
    image_prompts: Collection[str] | None,
    *,
    cuts: bool,
    enlarges: bool,
) -> TranslatedUnits:
    """Translate units into fields of Weft's request.

    Args:
        units: enabled units.
        start: image that the request starts from; units without an image use it.
        start_mode: resize mode of that image.
        controls: names of the model's ControlNets; None if the model is not loaded yet.
        image_prompts: names of the model's IP-Adapters; None if the model is not loaded yet.
        cuts: whether only the region around a mask is drawn.
        enlarges: whether the images are drawn a second time at a larger size.

    Raises:
        InvalidRequest: a unit has no image, or its model or preprocessor is unknown.
    """
    fields: dict[str, list[dict[str, Any]]] = {"controls": [], "image_prompts": []}
    ignored: list[str] = []
    idle = {"inpaint_crop_input_image": not cuts, "hr_option": not enlarges}
    for place, unit in enumerate(units):
        module, field = module_of(unit.module), f"controlnet.{place}"
        if module is None:
            raise InvalidRequest(
                f"{field}.module",
                f"{field}.module is {unit.module[:60]!r}; allowed are: {', '.join(MODULES)}. For "
                "another preprocessor, send a picture that was prepared with it, and the module "
                "none.",
            )
        name, beside = _named(f"{field}.model", unit.model, module, controls, image_prompts)
        image = unit.image
        if image is None:
            if start is None:
                raise InvalidRequest(f"{field}.image", f"{field}.image is required.")
            image = start.copied()
        chosen = {
            "name": name,
            "image": image,
            "scale": unit.weight,
            "start": unit.guidance_start,
            "end": unit.guidance_end,
        }
        left_out = [*(name for name, without in idle.items() if without)]
        left_out += _OF_CONTROLS if beside else ()
        ignored += [f"{field}.{name}" for name in _without_effect(unit) if name not in left_out]
        if beside:
            fields["image_prompts"].append(chosen | {"mask": unit.effective_region_mask})
            continue
        own_mode = start_mode if unit.image is None else unit.resize_mode
        inverted = "invert" if module == "invert" else None
        how = {"resize_mode": own_mode, "preprocessor": inverted, "precedence": unit.control_mode}
        fields["controls"].append(chosen | how)
    return TranslatedUnits({name: chosen for name, chosen in fields.items() if chosen}, ignored)


def _named(
    field: str,
    model: str,
    module: str,
    controls: Collection[str] | None,
    image_prompts: Collection[str] | None,
) -> tuple[str, bool]:
    """Return the name of a unit's ControlNet or IP-Adapter, and whether it is the latter.

    Raises:
        InvalidRequest: the model has neither a ControlNet nor an IP-Adapter of that name.
    """
    plain = _SUFFIX.sub("", model.strip())
    if controls is None or image_prompts is None:
        return plain, module == IP_ADAPTER
    steers = () if module == IP_ADAPTER else controls
    stands_beside = () if module == "invert" else image_prompts
    for beside, names in enumerate((steers, stands_beside)):
        for name in names:
            if name.casefold() == plain.casefold():
                return name, bool(beside)
    allowed = ", ".join((*steers, *stands_beside)) or "none, as the model has none"
    raise InvalidRequest(
        field, f"{field} is {model[:60]!r}; allowed with this module are: {allowed}."
    )


def _without_effect(unit: ControlNetUnit) -> list[str]:
    """Return the names of a unit's set fields that have no equivalent here."""
    return [name for name, neutral in _NEUTRAL.items() if getattr(unit, name) not in neutral]

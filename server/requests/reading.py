"""Reading of requests that use the field names and values of other programs and services."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from guidance.parts import PARTS
from samplers import SAMPLERS, SPACINGS
from samplers.other_names import CFG_PLUS_PLUS
from server.requests.choice import name_of
from server.requests.foreign_names import fields_of, sampler_of, schedule_of, shown

__all__ = ["LIKE", "RESIZE_MODES", "SAME", "SCALES", "Readable", "Reading", "translate_fields"]

SAME: Final[Mapping[str, str]] = MappingProxyType(
    {
        "num_inference_steps": "steps",
        "sampling_steps": "steps",
        "sampler_name": "sampler",
        "scheduler": "spacing",
        "schedule_type": "spacing",
        "num_images_per_prompt": "n",
        "num_images": "n",
        "num_outputs": "n",
        "batch_size": "n",
        "denoising_strength": "strength",
    }
)
"""Fields of other services, and Weft's fields with the same meaning."""

LIKE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "init_image": "image",
        "init_images": "image",
        "input_image": "image",
        "input_images": "reference_images",
        "reference_image": "reference_images",
        "image_url": "image",
        "mask_image": "mask",
        "mask_url": "mask",
        "lora": "adapters",
        "loras": "adapters",
        "controlnet": "controls",
        "control_image": "controls",
        "ip_adapter": "image_prompts",
        "ip_adapter_image": "image_prompts",
        "image_prompt": "image_prompts",
        "true_cfg_scale": "guidance",
        "format": "output_format",
        "enable_hr": "hires",
        "hr_scale": "hires",
        "hr_upscaler": "hires",
        "subseed": "variation",
        "subseed_strength": "variation",
        "variation_seed": "variation",
        "inpainting_fill": "mask_content",
    }
)
"""Fields of other services, and Weft's closest fields, for error messages."""

SCALES: Final = ("cfg_scale", "guidance_scale", "true_cfg_scale")
"""Names of `guidance.scale` in other services."""

RESIZE_MODES: Final = ("stretch", "crop", "fill")
"""Weft's names for AUTOMATIC1111's modes 0 to 2."""

RULE_OF_CFG_PP: Final = "cfg_plus_plus"

_SIZE: Final = re.compile(r"(\d{1,6})\s*[x×*]\s*(\d{1,6})", re.IGNORECASE)
_SAMPLERS: Final = frozenset(map(name_of, SAMPLERS))
_SPACINGS: Final = frozenset(map(name_of, SPACINGS))


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request was read.

    Attributes:
        notes: one sentence for each translation that was made.
        rule_left_out: whether `guidance` is an object without a name, whose fields apply to the
            default rule of the request.
        habitual: whether the client sends `guidance` regardless of the model, so that a distilled
            model's own guidance is used instead.
        composes: whether `guidance` composes several prompts, so that the model's own does not
            replace it.
        edits: whether `image` is to be edited by the prompt, in whatever way the model supports.
        distilled_scale: scale that such a client sends for distilled models that take one as input.
    """

    notes: tuple[str, ...] = ()
    rule_left_out: bool = False
    habitual: bool = False
    composes: bool = False
    distilled_scale: float | None = None
    edits: bool = False


DEFAULT_RULE: Final = "apg"
"""The rule by which a `guidance` object without a name is validated; its fields may apply to
another rule later, if the request's model has its own."""


class Readable(BaseModel):
    """A request whose fields are translated before validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[bool] = False
    """Whether fields may have names of other services."""

    _reading: Reading = PrivateAttr(default_factory=Reading)

    @property
    def reading(self) -> Reading:
        """How the request was read."""
        return self._reading

    def read_as(self, reading: Reading) -> Self:
        """Set how the request was read, and return the request."""
        self._reading = reading
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, dict):
            return validate(given)
        fields, reading = translate_fields(given, cls.model_fields if cls.renamed else ())
        return validate(fields).read_as(reading)


def translate_fields(
    given: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], Reading]:
    """Translate the fields and names of a request into this server's own.

    Only what is translated is validated; unknown fields are kept unchanged.

    Args:
        given: request as sent.
        known: fields that names of other services may refer to.

    Raises:
        PydanticCustomError: two fields have the same meaning, or a field is in the wrong place.
    """
    fields, notes = dict(given), list[str]()
    _rename(fields, known, notes)
    _read_scale(fields, known)
    _read_size(fields, known)
    if type(seed := fields.get("seed")) is int and seed == -1:
        del fields["seed"]
    if type(mode := fields.get("resize_mode")) is int and 0 <= mode < len(RESIZE_MODES):
        fields["resize_mode"] = RESIZE_MODES[mode]
    for part in PARTS:
        if part.field in fields:
            raise _refused(
                part.field,
                f"{part.field} is a field of guidance; send it within: "
                f'{{"guidance": {{"{part.field}": ...}}}}.',
            )
    _read_cfg_plus_plus(fields, notes)
    _read_names(fields, notes)
    guidance = fields.get("guidance")
    if isinstance(guidance, int | float) and not isinstance(guidance, bool):
        guidance = {"scale": guidance}
    if not isinstance(guidance, dict) or "name" in guidance:
        return fields, Reading(tuple(notes))
    fields["guidance"] = {"name": DEFAULT_RULE, **guidance}
    return fields, Reading(tuple(notes), rule_left_out=True)


def _rename(fields: dict[str, Any], known: Collection[str], notes: list[str]) -> None:
    renamed: list[str] = []
    for theirs, ours in SAME.items():
        if theirs not in fields or ours not in known:
            continue
        value = fields.pop(theirs)
        if value is None:
            continue
        # diffusers calls a sampler a scheduler.
        if theirs == "scheduler" and isinstance(value, str) and value.endswith("Scheduler"):
            ours = "sampler"
        if fields.get(ours) is not None:
            raise _refused(theirs, f"{theirs} means {ours}, which is set too; send one of them.")
        fields[ours] = value
        renamed.append(f"{theirs} as {ours}")
    if renamed:
        notes.append(f"Read {', '.join(renamed)}.")


def _read_scale(fields: dict[str, Any], known: Collection[str]) -> None:
    for theirs in SCALES:
        if theirs not in fields or "guidance" not in known:
            continue
        scale = fields.pop(theirs)
        if scale is None:
            continue
        guidance = fields.get("guidance") or {}
        if isinstance(guidance, str):
            guidance = {"name": guidance}
        if not isinstance(guidance, dict) or "scale" in guidance:
            raise _refused(
                theirs, f"{theirs} means guidance.scale, which is set too; send one of them."
            )
        fields["guidance"] = {**guidance, "scale": scale}


def _read_size(fields: dict[str, Any], known: Collection[str]) -> None:
    size = fields.get("size")
    if not isinstance(size, str) or "width" not in known:
        return
    del fields["size"]
    # Some of OpenAI's clients send it as an empty string when their users leave it out.
    if size.strip().casefold() in ("", "auto"):
        return
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise _refused(
            "size",
            f"size is {size[:60]!r}; it must be like '512x512', or width and height instead.",
        )
    for name, value in zip(("width", "height"), found.groups(), strict=True):
        if fields.get(name) is not None:
            raise _refused("size", f"size sets the {name}, which is set too; send one of them.")
        fields[name] = int(value)


def _read_cfg_plus_plus(fields: dict[str, Any], notes: list[str]) -> None:
    """Translate a sampler with built-in CFG++ into Weft's sampler and guidance.

    Raises:
        PydanticCustomError: the request names a different rule.
    """
    theirs, rest = _name_in(fields.get("sampler"))
    wanted = "" if theirs is None else theirs.strip().casefold().removesuffix("_gpu")
    for name, ours in CFG_PLUS_PLUS.items():
        if name.casefold() != wanted:
            continue
        guidance = fields.get("guidance") or {}
        guidance = {"name": guidance} if isinstance(guidance, str) else guidance
        guidance = {"scale": guidance} if isinstance(guidance, int | float) else guidance
        if not isinstance(guidance, dict) or guidance.get("name", RULE_OF_CFG_PP) != RULE_OF_CFG_PP:
            raise _refused(
                "sampler",
                f"sampler {theirs!r} is {shown(ours)} here, with guidance {RULE_OF_CFG_PP!r}; do "
                "not name another rule.",
            )
        fields["sampler"] = {**ours, **rest}
        fields["guidance"] = {**guidance, "name": RULE_OF_CFG_PP}
        notes.append(f"sampler {theirs!r} is {shown(ours)} here, with guidance {RULE_OF_CFG_PP!r}.")


def _read_names(fields: dict[str, Any], notes: list[str]) -> None:
    """Translate names of samplers and spacings from other programs.

    Names without an equivalent are kept, and refused with a reason when the field is validated.
    """
    theirs, rest = _name_in(fields.get("sampler"))
    schedule, _ = _name_in(fields.get("spacing"))
    if schedule is not None and schedule.strip().casefold() in ("", "automatic"):
        del fields["spacing"]
        schedule = "automatic"
    if theirs is not None and theirs not in _SAMPLERS:
        try:
            sampler, spacing = sampler_of(theirs, schedule if schedule == "automatic" else None)
        except ValueError:
            return
        ours = fields_of(sampler)
        fields["sampler"] = ours | rest
        said = f"sampler {theirs!r} is {shown(ours)} here"
        if spacing is not None and fields.get("spacing") is None:
            fields["spacing"] = fields_of(spacing)
            said += f", with spacing {shown(fields['spacing'])}"
        notes.append(f"{said}.")
    if schedule is None or schedule == "automatic" or schedule in _SPACINGS:
        return
    try:
        found = schedule_of(schedule)
    except ValueError:
        return
    if found is not None:
        _, rest = _name_in(fields["spacing"])
        ours = fields_of(found)
        fields["spacing"] = ours | rest
        notes.append(f"spacing {schedule!r} is {shown(ours)} here.")


def _name_in(value: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name in a choice, None if it has none, and its other fields."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and isinstance(name := value.get("name"), str):
        return name, {key: one for key, one in value.items() if key != "name"}
    return None, {}


def _refused(field: str, sentence: str) -> PydanticCustomError:
    return PydanticCustomError("sentence", "{sentence}", {"sentence": sentence, "field": field})

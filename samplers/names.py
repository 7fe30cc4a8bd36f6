"""Translation of other programs' names for samplers and spacings into those of this library."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, TypeVar

from samplers.noise_schedule import leaves_out_pure_noise
from samplers.other_names import (
    AUTOMATIC1111,
    COMFYUI,
    COMFYUI_SAMPLERS,
    DIFFUSERS,
    FORGE,
    FORGE_SCHEDULE_TYPES,
    LACKING,
    SCHEDULE_TYPES,
)
from samplers.registry import SAMPLERS
from samplers.sampler import Sampler
from samplers.spacing import Spacing
from samplers.spacings import SPACINGS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from samplers.other_names import Fields, Label, Scheduler

Kind = TypeVar("Kind", Sampler, Spacing)

_NOT_HERE: Final[Mapping[str, Any]] = {"thresholding": True, "final_sigmas_type": "sigma_min"}
"""Options of diffusers' schedulers that no sampler here supports."""


_LABELS: Final[Mapping[str, Label]] = {**AUTOMATIC1111, **FORGE}
_TYPES: Final[Mapping[str, Fields]] = {**SCHEDULE_TYPES, **FORGE_SCHEDULE_TYPES}


class NoEqual(ValueError):
    """Another program has something under this name that has no equivalent here."""


class UnknownName(ValueError):
    """No known program uses this name.

    Attributes:
        near: similar names, most similar first.
    """

    def __init__(self, field: str, text: str, known: Iterable[str]) -> None:
        by_case = {name.casefold(): name for name in known}
        found = get_close_matches(text.strip().casefold(), by_case, n=3, cutoff=0.5)
        self.near = tuple(by_case[name] for name in found)
        hint = f"; similar names are: {', '.join(self.near)}" if self.near else ""
        super().__init__(
            f"{field} {text[:60]!r} is not a name in AUTOMATIC1111, ComfyUI or diffusers{hint}."
        )


def named(text: str) -> tuple[Sampler, Spacing | None]:
    """The sampler, and spacing if any, that another program's name for a sampler stands for.

    Args:
        text: a sampler of AUTOMATIC1111 or Forge, alone or followed by a schedule type ("DPM++
            2M Karras"), a scheduler class of diffusers with its defaults, or a sampler of ComfyUI.
            Case is ignored. A name that two programs use means AUTOMATIC1111's.

    Returns:
        The sampler, and the spacing if the name includes one.

    Raises:
        NoEqual: the name is known but has no equivalent here.
        UnknownName: no known program uses the name; similar names are listed.
    """
    wanted = text.strip().casefold()
    for label, known in _LABELS.items():
        types = {kind: fields for kind, fields in _TYPES.items() if kind != "LCM"}
        types["Automatic"] = _TYPES[known.automatic]
        for one in (label, *known.aliases):
            spacings = {f"{one} {kind}".casefold(): fields for kind, fields in types.items()}
            if wanted == one.casefold():
                return _built(SAMPLERS, known.fields), None
            if wanted in spacings:
                return _built(SAMPLERS, known.fields), _built(SPACINGS, spacings[wanted])
    for name in DIFFUSERS:
        if wanted == name.casefold():
            return of_diffusers({"_class_name": name})
    if (plain := wanted.removesuffix("_gpu")) in COMFYUI_SAMPLERS:
        return _built(SAMPLERS, COMFYUI_SAMPLERS[plain]), None
    _refuse_lacking(text)
    raise UnknownName("sampler", text, [*COMFYUI_SAMPLERS, *_LABELS, *DIFFUSERS, *LACKING])


def automatic(text: str) -> Spacing | None:
    """The spacing that "Automatic" means for a sampler of AUTOMATIC1111 or Forge; None for others.

    Args:
        text: label or alias of the sampler in those programs; case is ignored.
    """
    wanted = text.strip().casefold()
    for label, known in _LABELS.items():
        if wanted in (one.casefold() for one in (label, *known.aliases)):
            return _built(SPACINGS, _TYPES[known.automatic])
    return None


def schedule_type(text: str) -> Spacing:
    """The spacing that AUTOMATIC1111's, Forge's or ComfyUI's name for a schedule stands for.

    Case is ignored. A name that two programs use means AUTOMATIC1111's.

    Raises:
        UnknownName: there is no such schedule type; similar names are listed.
    """
    for label, fields in _TYPES.items():
        if text.strip().casefold() in (label.casefold(), label.casefold().replace(" ", "_")):
            return _built(SPACINGS, fields)
    if (name := text.strip().casefold()) in COMFYUI:
        return _built(SPACINGS, COMFYUI[name])
    raise UnknownName("spacing", text, [*COMFYUI, *_TYPES])


def of_diffusers(config: Mapping[str, Any]) -> tuple[Sampler, Spacing]:
    """The sampler and spacing that a diffusers scheduler config stands for.

    The noise schedule is read by :meth:`samplers.NoiseSchedule.from_diffusers`.

    Args:
        config: as in `scheduler_config.json`, with `_class_name`; missing entries have diffusers'
            defaults.

    Raises:
        NoEqual: the class, or one of its options, has no equivalent here.
        UnknownName: the class is unknown; similar names are listed.
    """
    name = str(config.get("_class_name", ""))
    _refuse_lacking(name)
    if name not in DIFFUSERS:
        raise UnknownName("sampler", name, DIFFUSERS)
    known = DIFFUSERS[name]
    for option, value in _NOT_HERE.items():
        if option in config and config[option] == value:
            raise NoEqual(f"{option} of {name} is {value!r}, which has no equivalent here.")
    fields = dict(known.fields)
    for option, values in known.options.items():
        if option not in config:
            continue
        if config[option] not in values:
            allowed = ", ".join(repr(value) for value in values)
            raise NoEqual(
                f"{option} of {name} is {config[option]!r}; equivalents exist here for {allowed}."
            )
        fields |= values[config[option]]
    return _built(SAMPLERS, fields), _built(SPACINGS, _spacing_of(config, known))


def label_of(sampler: Sampler) -> str:
    """AUTOMATIC1111's label for a sampler, or our name where it has none."""
    labels = {label: known.fields for label, known in AUTOMATIC1111.items()}
    free = [
        key
        for known in AUTOMATIC1111.values()
        if known.fields["name"] == sampler.name
        for key in known.settings
    ]
    return _label(sampler, labels, free)


def schedule_type_of(spacing: Spacing) -> str:
    """AUTOMATIC1111's label for a spacing, or our name where it has none."""
    # Rounding makes no essential difference to the picture, and none where the steps divide the
    # timesteps.
    return _label(spacing, SCHEDULE_TYPES, ("rounding",))


def _spacing_of(config: Mapping[str, Any], known: Scheduler) -> Fields:
    if known.spacing["name"] == "lcm":
        # Times of these schedulers are a selection of the distilled ones, whatever other entries
        # say: a config made from another scheduler's keeps entries of that scheduler.
        return {"name": "lcm", "distilled_steps": config.get("original_inference_steps", 50)}
    by_option: Mapping[str, Fields] = {
        "use_karras_sigmas": {"name": "karras", "whole": known.multistep},
        "use_exponential_sigmas": {"name": "exponential"},
        "use_beta_sigmas": {"name": "beta", "over": "sigma"},
        "use_lu_lambdas": {"name": "logsnr", "whole": True},
    }
    for option, fields in by_option.items():
        if config.get(option):
            return fields
    if leaves_out_pure_noise(config):
        return {"name": "trailing"}
    match config.get("timestep_spacing"):
        case "leading":
            offset = config.get("steps_offset", 0)
            return {"name": "leading", "offset": offset, "endpoint": not known.multistep}
        case "trailing":
            return {"name": "trailing"}
        case "linspace":
            return {"name": "linspace", "endpoint": not known.multistep}
        case _:
            return known.spacing


def _label(ours: Sampler | Spacing, labels: Mapping[str, Fields], free: Collection[str]) -> str:
    """The first label that agrees in every field in which labels of this name differ."""
    built = {
        label: type(ours).model_validate(fields)
        for label, fields in labels.items()
        if fields["name"] == ours.name
    }
    telling = {key for label in built for key in labels[label]} - set(free)
    for label, theirs in built.items():
        if all(getattr(ours, key) == getattr(theirs, key) for key in telling):
            return label
    return ours.name


def _built(registry: Sequence[type[Kind]], fields: Fields) -> Kind:
    by_name = {kind.model_fields["name"].default: kind for kind in registry}
    return by_name[fields["name"]].model_validate(fields)


def _refuse_lacking(text: str) -> None:
    for name, why in LACKING.items():
        if text.strip().casefold() == name.casefold():
            raise NoEqual(f"sampler {name!r} has no equivalent here: {why}.")

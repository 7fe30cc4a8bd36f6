"""What samplers and spacings mean that a request calls by another program's name.

A name of this library always means what it means here, so `ddim` is ours, and not ComfyUI's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from samplers import Sampler, Spacing
from samplers.names import NoEqual, automatic, named, schedule_type
from samplers.registry import SAMPLERS
from samplers.spacings import SPACINGS
from server.requests.choice import listed, name_of

__all__ = ["fields_of", "sampler_of", "schedule_of", "shown", "why_no_sampler", "why_no_spacing"]

AUTOMATIC = "automatic"
"""The schedule type by which AUTOMATIC1111 leaves the choice to the sampler."""

_SAMPLERS = {name_of(kind): kind for kind in SAMPLERS}
_SPACINGS = {name_of(kind): kind for kind in SPACINGS}


def sampler_of(name: str, schedule: str | None = None) -> tuple[Sampler, Spacing | None]:
    """The sampler that a name stands for, and the spacing if the names say one.

    Args:
        name: of this library, or what AUTOMATIC1111, Forge, ComfyUI or diffusers call a sampler,
            with or without a schedule type after it ("DPM++ 2M Karras").
        schedule: as for :func:`schedule_of`; "Automatic" is what AUTOMATIC1111 then chooses for
            this sampler. A schedule type in ``name`` comes first, as there.

    Raises:
        NoEqual: another program has it, and nothing here is equal.
        ValueError: no program has it; near names are listed.
    """
    sampler, spacing = (
        (_SAMPLERS[name].model_validate({}), None) if name in _SAMPLERS else named(name)
    )
    if spacing is not None or schedule is None:
        return sampler, spacing
    if schedule.strip().casefold() == AUTOMATIC:
        return sampler, automatic(name)
    return sampler, schedule_of(schedule)


def schedule_of(name: str) -> Spacing | None:
    """The spacing that a name stands for; None for "Automatic", the sampler's own.

    Args:
        name: of this library, or what AUTOMATIC1111 or Forge call a schedule type, and ComfyUI a
            scheduler.

    Raises:
        ValueError: no program has it; near names are listed.
    """
    if name in _SPACINGS:
        return _SPACINGS[name].model_validate({})
    return None if name.strip().casefold() == AUTOMATIC else schedule_type(name)


def fields_of(chosen: Sampler | Spacing) -> dict[str, Any]:
    """A sampler or spacing as a request may state it: its name, and what is not at its default."""
    return {"name": chosen.name} | chosen.model_dump(mode="json", exclude_defaults=True)


def shown(fields: Mapping[str, Any]) -> str:
    """The same in a sentence: JSON, or the bare name where that says it all."""
    return repr(fields["name"]) if len(fields) == 1 else json.dumps(dict(fields))


def why_no_sampler(name: str) -> str | None:
    """Why a name stands for no sampler, if there is more to say than that it is unknown."""
    try:
        named(name)
    except NoEqual as lack:
        return str(lack).removesuffix(".")
    except ValueError as unknown:
        return _with_near("sampler", name, unknown)
    return None


def why_no_spacing(name: str) -> str | None:
    """The same for a spacing."""
    try:
        schedule_type(name)
    except ValueError as unknown:
        return _with_near("spacing", name, unknown)
    return None


def _with_near(field: str, name: str, unknown: ValueError) -> str | None:
    near = getattr(unknown, "near", ())
    return f"{field} {name[:60]!r} is unknown (did you mean {listed(near)}?)" if near else None

"""Meanings of sampler and spacing names that come from other programs.

A name of this library always has its own meaning, so `ddim` is Weft's and not ComfyUI's.
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
"""AUTOMATIC1111's schedule type that leaves the choice to the sampler."""

_SAMPLERS = {name_of(kind): kind for kind in SAMPLERS}
_SPACINGS = {name_of(kind): kind for kind in SPACINGS}


def sampler_of(name: str, schedule: str | None = None) -> tuple[Sampler, Spacing | None]:
    """Return the sampler that a name refers to, and the spacing if the names include one.

    Args:
        name: name in this library, or in AUTOMATIC1111, Forge, ComfyUI or diffusers, with or
            without a schedule type after it ("DPM++ 2M Karras").
        schedule: name as for :func:`schedule_of`; "Automatic" is what AUTOMATIC1111 then chooses
            for this sampler. A schedule type in ``name`` takes precedence, as in AUTOMATIC1111.

    Raises:
        NoEqual: another program has the sampler, but there is no equivalent here.
        ValueError: the name is unknown; similar names are listed.
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
    """Return the spacing that a name refers to; None for "Automatic", the sampler's own.

    Args:
        name: name in this library, of a schedule type in AUTOMATIC1111 or Forge, or of a scheduler
            in ComfyUI.

    Raises:
        ValueError: the name is unknown; similar names are listed.
    """
    if name in _SPACINGS:
        return _SPACINGS[name].model_validate({})
    return None if name.strip().casefold() == AUTOMATIC else schedule_type(name)


def fields_of(chosen: Sampler | Spacing) -> dict[str, Any]:
    """Return a sampler or spacing as in a request: its name and its non-default parameters."""
    return {"name": chosen.name} | chosen.model_dump(mode="json", exclude_defaults=True)


def shown(fields: Mapping[str, Any]) -> str:
    """Format such fields for a sentence: as JSON, or the bare name if there is nothing else."""
    return repr(fields["name"]) if len(fields) == 1 else json.dumps(dict(fields))


def why_no_sampler(name: str) -> str | None:
    """Return why a name refers to no sampler, if there is more to say than that it is unknown."""
    try:
        named(name)
    except NoEqual as lack:
        return str(lack).removesuffix(".")
    except ValueError as unknown:
        return _with_near("sampler", name, unknown)
    return None


def why_no_spacing(name: str) -> str | None:
    """Return why a name refers to no spacing, if there is more to say than that it is unknown."""
    try:
        schedule_type(name)
    except ValueError as unknown:
        return _with_near("spacing", name, unknown)
    return None


def _with_near(field: str, name: str, unknown: ValueError) -> str | None:
    near = getattr(unknown, "near", ())
    return f"{field} {name[:60]!r} is unknown (did you mean {listed(near)}?)" if near else None

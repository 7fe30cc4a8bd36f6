"""Translates names that users know from other programs, for error messages."""

from __future__ import annotations

import json

from samplers import Sampler, Spacing
from samplers.names import NoEqual, named, schedule_type

__all__ = ["sampler_elsewhere", "spacing_elsewhere"]


def sampler_elsewhere(name: str) -> str | None:
    """Which sampler here is another program's, or why there is none; None for unknown names."""
    try:
        sampler, spacing = named(name)
    except NoEqual as lack:
        return str(lack).removesuffix(".")
    except ValueError:
        return None
    with_spacing = "" if spacing is None else f", with spacing {_shown(spacing)}"
    return f"sampler {name!r} corresponds to {_shown(sampler)} here{with_spacing}"


def spacing_elsewhere(name: str) -> str | None:
    """The same for a spacing, which AUTOMATIC1111 calls a schedule type and ComfyUI a scheduler."""
    try:
        spacing = schedule_type(name)
    except ValueError:
        return None
    return f"spacing {name!r} corresponds to {_shown(spacing)} here"


def _shown(ours: Sampler | Spacing) -> str:
    """As a request may state it: a name, or an object if a field differs from its default."""
    fields = ours.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"name": ours.name} | fields) if fields else repr(ours.name)

"""Names that users bring from other programs, as error sentences translate them."""

from __future__ import annotations

import json

from samplers import Sampler, Spacing
from samplers.names import NoEqual, named, schedule_type

__all__ = ["sampler_elsewhere", "spacing_elsewhere"]


def sampler_elsewhere(name: str) -> str | None:
    """What a sampler of another program is called here, or why it is not; None if none knows it."""
    try:
        sampler, spacing = named(name)
    except NoEqual as lack:
        return str(lack).removesuffix(".")
    except ValueError:
        return None
    with_spacing = "" if spacing is None else f" with spacing {_shown(spacing)}"
    return f"sampler {name!r} is here sampler {_shown(sampler)}{with_spacing}"


def spacing_elsewhere(name: str) -> str | None:
    """The same of a spacing, which AUTOMATIC1111 calls a schedule type."""
    try:
        spacing = schedule_type(name)
    except NoEqual as lack:
        return str(lack).removesuffix(".")
    except ValueError:
        return None
    return f"spacing {name!r} is here spacing {_shown(spacing)}"


def _shown(ours: Sampler | Spacing) -> str:
    """As a request may have it: a name, or an object where a field differs from its default."""
    fields = ours.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"name": ours.name} | fields) if fields else repr(ours.name)

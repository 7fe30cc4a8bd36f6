"""Names of samplers and schedule types as AUTOMATIC1111's clients use them.

If a name is also one of this server's own, AUTOMATIC1111's meaning applies here.
"""

from __future__ import annotations

from samplers import SAMPLERS, SPACINGS, Sampler, Spacing
from samplers.names import automatic, named, schedule_type
from samplers.other_names import AUTOMATIC1111, FORGE, FORGE_SCHEDULE_TYPES, SCHEDULE_TYPES
from server.requests.choice import name_of
from server.requests.foreign_names import AUTOMATIC, sampler_of, schedule_of

__all__ = ["sampler_and_spacing", "sampler_labels", "schedule_labels"]

_LISTS = {"custom"}
"""Spacings that need a list from the request, so that the name alone is not enough."""


def sampler_and_spacing(name: str, schedule: str | None) -> tuple[Sampler, Spacing | None]:
    """Return the sampler and spacing that a client requests.

    Args:
        name: name of the sampler, with or without a schedule type after it.
        schedule: schedule type; None and "Automatic" leave it to the sampler.

    Raises:
        NoEqual: another program has the sampler, but there is no equivalent here.
        ValueError: the sampler or schedule type is unknown; similar names are listed.
    """
    try:
        sampler, spacing = named(name)
    except ValueError:
        sampler, spacing = sampler_of(name)
    if spacing is not None:
        return sampler, spacing
    if schedule is None or schedule.strip().casefold() in ("", AUTOMATIC):
        return sampler, automatic(name)
    try:
        return sampler, schedule_type(schedule)
    except ValueError:
        return sampler, schedule_of(schedule)


def sampler_labels() -> dict[str, tuple[str, ...]]:
    """Return labels and aliases of AUTOMATIC1111's and Forge's samplers, and names of others."""
    labels = {label: known.aliases for label, known in {**AUTOMATIC1111, **FORGE}.items()}
    taken = {one.casefold() for label, aliases in labels.items() for one in (label, *aliases)}
    return labels | {name: () for name in map(name_of, SAMPLERS) if name not in taken}


def schedule_labels() -> tuple[str, ...]:
    """Return labels of AUTOMATIC1111's and Forge's schedule types, and names of other spacings."""
    labels = (*SCHEDULE_TYPES, *FORGE_SCHEDULE_TYPES)
    taken = {label.casefold().replace(" ", "_") for label in labels}
    return (*labels, *(name for name in map(name_of, SPACINGS) if name not in taken | _LISTS))

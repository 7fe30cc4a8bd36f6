"""Classes that other distributions register under entry points."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")


def with_installed(
    group: str, kind: type[Kind], ours: Iterable[type[Kind]]
) -> tuple[type[Kind], ...]:
    """Our classes, and those of a group; one that cannot be used is named and left out.

    Args:
        group: of entry points.
        kind: what each must be a subclass of.
        ours: whose names are taken.
    """
    found = list(ours)
    taken = {_name_of(one) for one in found}
    for entry in entry_points(group=group):
        try:
            one = entry.load()
            if not (isinstance(one, type) and issubclass(one, kind)):
                raise TypeError(f"{entry.value} is not a subclass of {kind.__name__}")
            name = _name_of(one)
            if not name or name in taken:
                raise ValueError(f"its name {name!r} is {'taken' if name else 'missing'}")
        except Exception as error:  # noqa: BLE001 - another distribution's code may raise anything
            distribution = entry.dist.name if entry.dist else "an unknown distribution"
            logger.warning(
                "%s %r of %s is left out: %s: %s",
                group,
                entry.name,
                distribution,
                type(error).__name__,
                error,
            )
        else:
            taken.add(name)
            found.append(one)
    return tuple(found)


def _name_of(kind: type) -> str:
    """The default of its field `name`, by which requests choose it."""
    field = getattr(kind, "model_fields", {}).get("name")
    return "" if field is None else str(field.default)

"""Classes that other distributions register through entry points."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")


def with_installed(
    group: str,
    kind: type[Kind],
    ours: Iterable[type[Kind]],
    reserved: Collection[str] = (),
) -> tuple[type[Kind], ...]:
    """Our classes followed by those of an entry-point group.

    A class that cannot be used is left out, with a warning that names it.

    Args:
        group: name of the entry-point group.
        kind: class that each entry must be a subclass of.
        ours: our own classes, whose names are taken.
        reserved: names that no parameter may have, as requests have other fields of these names.
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
            _check(one, name, reserved)
        except Exception as error:  # noqa: BLE001 - another distribution's code may raise anything
            distribution = entry.dist.name if entry.dist else "an unknown distribution"
            logger.warning(
                "%s %r of %s is left out: %s: %s",
                group,
                entry.name,
                distribution,
                type(error).__name__,
                " ".join(str(error).split()),
            )
        else:
            taken.add(name)
            found.append(one)
    return tuple(found)


def _name_of(kind: type) -> str:
    """The default of the class's field `name`, by which requests choose it."""
    field = getattr(kind, "model_fields", {}).get("name")
    return "" if field is None else str(field.default)


def _check(one: Any, name: str, reserved: Collection[str]) -> None:
    """Raise what would fail later in requests and the catalog, which share one schema."""
    if taken := [field for field in one.model_fields if field in reserved]:
        raise ValueError(f"its parameter {taken[0]!r} has the name of another field of requests")
    if get_args(one.model_fields["name"].annotation) != (name,):
        raise TypeError("its field name must be a Literal with one name, which is its default")
    # The instance that the bare name stands for must be hashable: plans are cached, and rows
    # grouped, by equality.
    hash(one.model_validate({}))
    one.model_json_schema()

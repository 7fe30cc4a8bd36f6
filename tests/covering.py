"""Which cells of a product of parameters the suite tries: a covering few, or all of them.

``make test`` takes few, ``make test-all`` sets ``EVERY_CELL=1`` and takes all.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import Any, TypeVar

EVERY_CELL = os.environ.get("EVERY_CELL") == "1"

T = TypeVar("T")


def covering(
    cells: Iterable[T],
    values: Callable[[T], Sequence[Hashable]],
    together: int = 1,
    every_cell: bool = EVERY_CELL,
) -> list[T]:
    """Few cells that miss nothing: the same ones each time, in the order given.

    Args:
        cells: of a product, which may have holes where values do not go together.
        values: a cell's value on each axis.
        together: 1 meets each value of each axis, 2 each pair of values that some cell has.
            Where a cell has one value alone, that.
        every_cell: whether to take all instead.
    """
    found = list(cells)
    if every_cell:
        return found
    placed = [tuple(enumerate(values(cell))) for cell in found]
    parts = [frozenset(combinations(on, min(together, len(on)))) for on in placed]
    cells_of: dict[tuple[tuple[int, Hashable], ...], list[int]] = {}
    for i, own in enumerate(parts):
        for part in own:
            cells_of.setdefault(part, []).append(i)
    # Of each cell: how many parts it would add, and how often its parts have been chosen.
    adds, met = [len(own) for own in parts], [0] * len(parts)
    chosen: set[int] = set()
    added: set[tuple[tuple[int, Hashable], ...]] = set()
    while most := max(adds, default=0):
        # Of those that add most, the one whose values have been met least, so that none of them
        # goes with the first of another axis alone.
        best = min((i for i, number in enumerate(adds) if number == most), key=met.__getitem__)
        chosen.add(best)
        for part in parts[best]:
            new = part not in added
            added.add(part)
            for i in cells_of[part]:
                met[i] += 1
                adds[i] -= new
    return [found[i] for i in sorted(chosen)]


def spread(*axes: Iterable[Any], together: int = 1) -> list[tuple[Any, ...]]:
    """A covering few of all combinations of these values, which need not be hashable."""
    listed = [list(axis) for axis in axes]
    places = covering(product(*(range(len(axis)) for axis in listed)), tuple, together)
    return [tuple(axis[at] for axis, at in zip(listed, place, strict=True)) for place in places]


def few_of(values: Iterable[T], few: Iterable[T]) -> list[T]:
    """Those few of the values that can tell as much as all, or all.

    Raises:
        ValueError: one of the few is none of the values.
    """
    found, chosen = list(values), list(few)
    if strange := [one for one in chosen if one not in found]:
        raise ValueError(f"{strange} are none of {found}")
    return found if EVERY_CELL else chosen

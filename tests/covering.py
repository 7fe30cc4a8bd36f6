"""Selection of the parameter combinations that the suite tries: a covering array, or all of them.

``make test`` uses the covering array; ``make test-all`` sets ``EVERY_CELL=1`` and uses all.
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
    """A small covering selection of cells: the same each time, in the order given.

    Args:
        cells: cells of a product, which may lack combinations of incompatible values.
        values: returns a cell's value on each axis.
        together: 1 covers each value of each axis, 2 each pair of values that occurs in a cell.
            For a cell with a single value, that value is covered.
        every_cell: whether to take all cells instead.
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
    # For each cell: how many parts it would add, and how often its parts have been chosen.
    adds, met = [len(own) for own in parts], [0] * len(parts)
    chosen: set[int] = set()
    added: set[tuple[tuple[int, Hashable], ...]] = set()
    while most := max(adds, default=0):
        # Of the cells that add most, take the one whose values were used least, so that no value is
        # combined only with the first value of another axis.
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
    """A covering selection of all combinations of these values, which need not be hashable."""
    listed = [list(axis) for axis in axes]
    places = covering(product(*(range(len(axis)) for axis in listed)), tuple, together)
    return [tuple(axis[at] for axis, at in zip(listed, place, strict=True)) for place in places]


def few_of(values: Iterable[T], few: Iterable[T]) -> list[T]:
    """A representative few of the values, or all of them for the full suite.

    Raises:
        ValueError: one of the few is not among the values.
    """
    found, chosen = list(values), list(few)
    if strange := [one for one in chosen if one not in found]:
        raise ValueError(f"{strange} are none of {found}")
    return found if EVERY_CELL else chosen

"""Which cells of a product of parameters the suite tries: a covering few, or all of them.

``make test`` takes few, ``make test-all`` sets ``EVERY_CELL=1`` and takes all.
"""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar

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
    adds = [len(own) for own in parts]
    used: Counter[tuple[tuple[int, Hashable], ...]] = Counter()
    chosen: set[int] = set()
    while most := max(adds, default=0):
        # Of those that add most, the one whose values have been met least, so that none of them
        # goes with the first of another axis alone.
        best = min(
            (i for i, added in enumerate(adds) if added == most),
            key=lambda i: sum(used[part] for part in parts[i]),
        )
        chosen.add(best)
        for part in parts[best]:
            if not used[part]:
                for i in cells_of[part]:
                    adds[i] -= 1
        used.update(parts[best])
    return [found[i] for i in sorted(chosen)]

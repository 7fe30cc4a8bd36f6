"""At how many rows forwards run where the first one of its size is slow: pure, touches no device.

A GPU's libraries choose and build kernels for every new shape. On an H100 the first forward of a
number of rows of Stable Diffusion 1.5 takes 0.55 s and the next one 0.03 s. So forwards run at few
numbers of rows, which are soon known, and rows that nobody reads fill them up.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FIRST_FORWARD_S", "ROW_SIZES", "FixedRows", "RowSizes"]

ROW_SIZES = (1, 2, 3, 4, 6, 8, 10, 12, *range(16, 33, 4), *range(40, 65, 8), *range(80, 129, 16))
"""Numbers of rows that forwards run at. Up to 12 rows a GPU waits for its orders, so that a row
more costs nothing; from there on filling up adds a quarter at most, and a tenth on average."""

FIRST_FORWARD_S = 0.5
"""What the first forward of a size takes longer than the next one."""


class RowSizes:
    """The numbers of rows that forwards of one model and latent shape have run at, or are to.

    Args:
        most: rows of a forward.
    """

    def __init__(self, most: int) -> None:
        self._usual = [*(size for size in ROW_SIZES if size < most), most]
        self._known: list[int] = []
        self._lost_s: defaultdict[int, float] = defaultdict(float)

    @property
    def known(self) -> tuple[int, ...]:
        """Sizes that have run, from the smallest."""
        return tuple(self._known)

    @property
    def wanted(self) -> list[int]:
        """Sizes that have not run and are worth a first forward, from the smallest.

        Beside the usual ones these are numbers of rows for which filling up has taken longer, all
        in all, than a first forward of their own takes.
        """
        own = {rows for rows, lost_s in self._lost_s.items() if lost_s >= FIRST_FORWARD_S}
        return sorted(own.union(self._usual).difference(self._known))

    def of(self, rows: int, most: int, seconds: Callable[[int], float]) -> int:
        """The number of rows that a forward of some rows is to run at.

        That is the least known one, unless filling up to it takes longer than the first forward of
        the next usual one, less what filling up has taken so far.

        Args:
            rows: that there are.
            most: rows that fit into memory.
            seconds: expected for a forward of so many rows, once it has run.
        """
        options: list[tuple[float, int]] = []
        known = bisect_left(self._known, rows)
        if known < len(self._known) and self._known[known] <= max(rows, most):
            size = self._known[known]
            options.append((seconds(size), size))
        usual = bisect_left(self._usual, rows)
        if usual < len(self._usual) and self._usual[usual] <= most:
            size = self._usual[usual]
            first_s = max(0.0, FIRST_FORWARD_S - self._lost_s[rows])
            options.append((seconds(size) + first_s, size))
        return min(options)[1] if options else rows

    def note(self, rows: int, size: int, seconds: Callable[[int], float]) -> None:
        """A forward of some rows has run at a size, which is known from now on."""
        if size not in self._known:
            insort(self._known, size)
        if size > rows:
            self._lost_s[rows] += seconds(size) - seconds(rows)

    def leave_out(self, size: int) -> None:
        """Want no size that is as large, as there may be no memory for it."""
        self._usual = [one for one in self._usual if one < size]
        self._lost_s = defaultdict(
            float, {rows: lost for rows, lost in self._lost_s.items() if rows < size}
        )


class FixedRows:
    """Stands for :class:`RowSizes` in deterministic mode, where nothing but an image decides.

    Args:
        rows: of most forwards; those of images that need more at once have more.
    """

    def __init__(self, rows: int) -> None:
        self._wanted = [rows]
        self._known: set[int] = set()

    @property
    def known(self) -> tuple[int, ...]:
        """Sizes that have run, from the smallest."""
        return tuple(sorted(self._known))

    @property
    def wanted(self) -> list[int]:
        """The size of most forwards until it has run."""
        return [rows for rows in self._wanted if rows not in self._known]

    def of(self, rows: int, _most: int, _seconds: Callable[[int], float]) -> int:
        """The number of rows itself, as what fills a forward up is in it already."""
        return rows

    def note(self, _rows: int, size: int, _seconds: Callable[[int], float]) -> None:
        """A forward has run at a size."""
        self._known.add(size)

    def leave_out(self, size: int) -> None:
        """Want no size that is as large, as there may be no memory for it."""
        self._wanted = [rows for rows in self._wanted if rows < size]

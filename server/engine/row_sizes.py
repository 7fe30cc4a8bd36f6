"""Choice of the numbers of rows that forward passes are padded to: pure, touches no device.

A GPU's libraries choose and build kernels for every new shape. On an H100 the first forward pass of
a number of rows of Stable Diffusion 1.5 takes 0.55 s and the next one 0.03 s. So passes run at few
numbers of rows, which have soon all been used, and are padded to them with rows whose outputs are
not read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FIRST_FORWARD_OVERHEAD_S", "ROW_SIZES", "FixedRows", "RowSizes"]

ROW_SIZES = (1, 2, 3, 4, 6, 8, 10, 12, *range(16, 33, 4), *range(40, 65, 8), *range(80, 129, 16))
"""Numbers of rows that passes run at. Up to 12 rows a GPU waits for kernel launches, so another row
costs nothing; beyond that, padding adds a quarter at most, and a tenth on average."""

FIRST_FORWARD_OVERHEAD_S = 0.5
"""Seconds that the first forward pass of a size takes longer than the next one."""


class RowSizes:
    """Numbers of rows that passes of one model and latent shape have run at, or should run at.

    Args:
        max_rows: maximum number of rows in a forward pass.
    """

    def __init__(self, max_rows: int) -> None:
        self._usual = [*(size for size in ROW_SIZES if size < max_rows), max_rows]
        self._known: list[int] = []
        self._lost_s: defaultdict[int, float] = defaultdict(float)

    @property
    def known(self) -> tuple[int, ...]:
        """Sizes that have run, in ascending order."""
        return tuple(self._known)

    @property
    def wanted(self) -> list[int]:
        """Sizes that have not run and are worth a first pass, in ascending order.

        Besides the usual ones these are numbers of rows for which padding has cost more time in
        total than a first pass of their own takes.
        """
        own = {rows for rows, lost_s in self._lost_s.items() if lost_s >= FIRST_FORWARD_OVERHEAD_S}
        return sorted(own.union(self._usual).difference(self._known))

    def of(self, rows: int, max_rows: int, seconds: Callable[[int], float]) -> int:
        """Return the number of rows that a forward pass should run at.

        That is the smallest known size, unless padding to it takes longer than the first pass of
        the next usual size, less the time that padding has taken so far.

        Args:
            rows: number of rows before padding.
            max_rows: maximum number of rows that fit into memory.
            seconds: function from a number of rows to the expected seconds of a pass that has run
                at this number before.
        """
        options: list[tuple[float, int]] = []
        known = bisect_left(self._known, rows)
        if known < len(self._known) and self._known[known] <= max(rows, max_rows):
            size = self._known[known]
            options.append((seconds(size), size))
        usual = bisect_left(self._usual, rows)
        if usual < len(self._usual) and self._usual[usual] <= max_rows:
            size = self._usual[usual]
            first_s = max(0.0, FIRST_FORWARD_OVERHEAD_S - self._lost_s[rows])
            options.append((seconds(size) + first_s, size))
        return min(options)[1] if options else rows

    def note(self, rows: int, size: int, seconds: Callable[[int], float]) -> None:
        """Record that a pass of ``rows`` rows has run at a size, which is known from now on."""
        if size not in self._known:
            insort(self._known, size)
        if size > rows:
            self._lost_s[rows] += seconds(size) - seconds(rows)

    def leave_out(self, size: int) -> None:
        """Exclude sizes from ``size`` on, since there may be no memory for them."""
        self._usual = [one for one in self._usual if one < size]
        self._lost_s = defaultdict(
            float, {rows: lost for rows, lost in self._lost_s.items() if rows < size}
        )


class FixedRows:
    """Replacement of :class:`RowSizes` in deterministic mode, where only an image decides.

    Args:
        rows: number of rows of most passes; images that need more at once have larger ones.
    """

    def __init__(self, rows: int) -> None:
        self._wanted = [rows]
        self._known: set[int] = set()

    @property
    def known(self) -> tuple[int, ...]:
        """Sizes that have run, in ascending order."""
        return tuple(sorted(self._known))

    @property
    def wanted(self) -> list[int]:
        """The size of most passes, until it has run."""
        return [rows for rows in self._wanted if rows not in self._known]

    def of(self, rows: int, _max_rows: int, _seconds: Callable[[int], float]) -> int:
        """Return ``rows`` itself, since padding is already included."""
        return rows

    def note(self, _rows: int, size: int, _seconds: Callable[[int], float]) -> None:
        """Record that a pass has run at a size."""
        self._known.add(size)

    def leave_out(self, size: int) -> None:
        """Exclude sizes from ``size`` on, since there may be no memory for them."""
        self._wanted = [rows for rows in self._wanted if rows < size]

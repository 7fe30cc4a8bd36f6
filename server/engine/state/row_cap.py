"""Limit on the rows of a lane that fit into the device's memory at once, learned from ticks."""

from __future__ import annotations

RECOVERY_TICKS = 256
"""Full ticks after which an eighth more is tried, since other users of the memory may have gone."""


class RowCap:
    """Halves when a forward pass runs out of memory, and recovers slowly while full ticks succeed.

    Args:
        max_rows: initial and maximum number of rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._full_ticks = 0

    def overflow(self, rows: int) -> None:
        """Record that a number of rows did not fit."""
        self.rows = max(1, min(self.rows, rows // 2))
        self._full_ticks = 0

    def fit(self, rows: int) -> None:
        """Record that a number of rows fitted."""
        if rows < self.rows or self.rows == self._max_rows:
            return
        self._full_ticks += 1
        if self._full_ticks == RECOVERY_TICKS:
            self.rows = min(self._max_rows, self.rows + max(1, self.rows // 8))
            self._full_ticks = 0

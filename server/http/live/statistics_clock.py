"""Clock that decides when a stream's statistics are due, on a WebSocket and among events."""

from __future__ import annotations

from time import monotonic

__all__ = ["StatisticsClock"]


class StatisticsClock:
    """Counts from when statistics were switched on, whatever else is sent or changed since."""

    def __init__(self) -> None:
        self._every_s: float | None = None
        self._told_at = 0.0

    def left(self, every_s: float | None) -> float | None:
        """Return the seconds until the next statistics are due, 0 if they are due; None if off.

        Args:
            every_s: seconds between statistics by the current settings; None if off.
        """
        if self._every_s is None:
            self._told_at = monotonic()
        self._every_s = every_s
        return None if every_s is None else max(0.0, self._told_at + every_s - monotonic())

    def mark_sent(self) -> None:
        """Count statistics as sent; others that are overdue by then are skipped."""
        if self._every_s is not None:
            since = monotonic() - self._told_at
            self._told_at += self._every_s * max(1, since // self._every_s)

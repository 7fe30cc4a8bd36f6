"""The line of requests that wait for their first evaluation, in order of arrival."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["WaitingLine"]


class WaitingLine:
    """Tickets of waiting requests; used only in the event loop."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._next = 0

    def join(self) -> int:
        """Return a ticket at the end of the line."""
        ticket, self._next = self._next, self._next + 1
        self._waiting.append(ticket)
        return ticket

    def leave(self, ticket: int) -> None:
        """Leave the line; does nothing the second time."""
        if self.position(ticket) is not None:
            del self._waiting[bisect_left(self._waiting, ticket)]

    def position(self, ticket: int) -> int | None:
        """Number of tickets before this one; None if it is no longer in the line."""
        place = bisect_left(self._waiting, ticket)
        waits = place < len(self._waiting) and self._waiting[place] == ticket
        return place if waits else None

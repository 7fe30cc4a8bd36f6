"""Which requests wait for their first evaluation, in the order in which they came."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["WaitingLine"]


class WaitingLine:
    """Tickets of those who wait; the event loop's alone."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._next = 0

    def join(self) -> int:
        """A ticket at the end of the line."""
        ticket, self._next = self._next, self._next + 1
        self._waiting.append(ticket)
        return ticket

    def leave(self, ticket: int) -> None:
        """Leave the line; does nothing the second time."""
        if self.position(ticket) is not None:
            del self._waiting[bisect_left(self._waiting, ticket)]

    def position(self, ticket: int) -> int | None:
        """How many are before a ticket; None if it is not in the line any more."""
        place = bisect_left(self._waiting, ticket)
        waits = place < len(self._waiting) and self._waiting[place] == ticket
        return place if waits else None

"""Positions count the requests ahead, also when some leave."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.service.waiting_line import WaitingLine


@given(st.lists(st.integers(0, 20)))
def test_a_position_is_the_number_of_those_before(leaving: list[int]) -> None:
    line, waiting = WaitingLine(), list[int]()
    for place in leaving:
        waiting.append(line.join())
        if place < len(waiting):
            gone = waiting.pop(place)
            line.leave(gone)
            line.leave(gone)
            assert line.position(gone) is None
        assert [line.position(ticket) for ticket in waiting] == list(range(len(waiting)))

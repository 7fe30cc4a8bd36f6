"""When statistics are due, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.http.live import statistics_clock
from server.http.live.statistics_clock import StatisticsClock


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [100.0]
    monkeypatch.setattr(statistics_clock, "monotonic", lambda: now[0])

    def to(seconds: float) -> None:
        now[0] = 100.0 + seconds

    return to


def test_statistics_are_due_at_multiples_of_their_interval(turn: Callable[[float], None]) -> None:
    clock = StatisticsClock()
    assert clock.left(2.0) == 2
    turn(1.5)
    assert clock.left(2.0) == 0.5
    turn(2.25)
    assert clock.left(2.0) == 0
    clock.mark_sent()
    assert clock.left(2.0) == 1.75
    turn(8.5)
    clock.mark_sent()
    assert clock.left(2.0) == 1.5, "what was missed is not made up for"


def test_the_interval_may_change_and_begins_when_it_is_switched_on(
    turn: Callable[[float], None],
) -> None:
    clock = StatisticsClock()
    assert clock.left(None) is None
    turn(5.0)
    assert clock.left(1.0) == 1
    turn(5.5)
    assert clock.left(3.0) == 2.5
    assert clock.left(0.25) == 0

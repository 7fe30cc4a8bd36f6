"""Which images of other sizes join a tick, given what ticks of each size cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.client import ANONYMOUS, Client, Flow
from server.engine.fair_queue import Turns
from server.engine.fair_tick import fair_tick
from server.engine.mixed_tick import joining
from server.engine.scheduler import Candidate, LaneCosts, Priority
from tests.server.engine.simulated_device import Device, Sender, fairly, jain

SOMEBODY = Client("somebody")
SMALL, LARGE, OTHER_MODEL = 0, 1, 2
AREAS = {SMALL: 16, LARGE: 24, OTHER_MODEL: 16}
MAX_ROWS = 16

Curve = Callable[[int], float]


def image(lane: int, client: Client = ANONYMOUS, rows: int = 1, **more: Any) -> Candidate:
    fields: dict[str, Any] = {"remaining": 1.0, "age": 0.0, "priority": Priority.INTERACTIVE}
    return Candidate(rows=rows, lane=lane, flow=Flow(client, lane), **{**fields, **more})


def launches(_: int) -> float:
    """A forward takes as long as launching its kernels, whatever its rows."""
    return 1.0


def arithmetic(rows: int) -> float:
    """Each row takes its own time: a full device."""
    return float(rows)


def until_full(rows: int) -> float:
    """Limited by launches up to eight rows, and by arithmetic above."""
    return max(1.0, rows / 8)


def lanes_of(curve: Curve, max_tick_s: float = 100.0, mixing: float = 1.0) -> dict[int, LaneCosts]:
    """Costs of the lanes, by the curve, in proportion to the area."""

    def of(area: int) -> Curve:
        return lambda rows: curve(rows) * area / AREAS[SMALL]

    return {
        lane: LaneCosts(MAX_ROWS, of(area), max_tick_s, area, lane == OTHER_MODEL, mixing)
        for lane, area in AREAS.items()
    }


def join(chosen: int, waiting: int, curve: Curve, *, lead: int, **more: Any) -> int:
    """How many of the waiting images of one size join a tick of the other size."""
    units = [image(lead)] * chosen + [image(LARGE if lead == SMALL else SMALL)] * waiting
    order = range(chosen, chosen + waiting)
    return len(joining(units, range(chosen), order, lanes_of(curve, **more)))


@pytest.mark.parametrize("lead", [SMALL, LARGE])
def test_sizes_share_a_forward_that_would_take_its_time_anyway(lead: int) -> None:
    assert join(4, 4, launches, lead=lead) == 4


@pytest.mark.parametrize("lead", [SMALL, LARGE])
def test_sizes_stay_apart_where_filling_up_the_smaller_costs_more_than_a_forward(lead: int) -> None:
    assert join(4, 4, arithmetic, lead=lead) == 0


@pytest.mark.parametrize(("mixing", "join_it"), [(1.5, 4), (2.1, 0)])
def test_sizes_share_a_forward_only_where_that_saves_more_than_mixing_costs(
    mixing: float, join_it: int
) -> None:
    """Apart the two take 1 and 1.5, together 1.5 times ``mixing``: less below 1.67."""
    assert join(4, 4, launches, lead=SMALL, mixing=mixing) == join_it


def test_as_many_join_as_save_most() -> None:
    assert join(2, 12, until_full, lead=LARGE) == 6


def test_no_more_join_than_a_forward_may_have_or_may_take() -> None:
    assert join(10, 10, launches, lead=SMALL) == MAX_ROWS - 10
    assert join(2, 8, until_full, lead=LARGE, max_tick_s=1.0) == 0
    assert join(2, 8, until_full, lead=LARGE, max_tick_s=1.5) == 6


@given(
    fixed=st.floats(0, 1),
    each=st.floats(0.01, 1),
    chosen=st.integers(1, 8),
    waiting=st.integers(1, 8),
    lead=st.sampled_from([SMALL, LARGE]),
)
def test_what_joins_never_costs_more_than_ticks_apart(
    fixed: float, each: float, chosen: int, waiting: int, lead: int
) -> None:
    def curve(rows: int) -> float:
        return fixed + each * rows

    joined = join(chosen, waiting, curve, lead=lead)
    lanes = lanes_of(curve)
    other = LARGE if lead == SMALL else SMALL
    price = lanes[other].seconds(waiting) / waiting
    if joined:
        longer = lanes[LARGE].seconds(chosen + joined) - lanes[lead].seconds(chosen)
        assert longer <= price * joined


def tick(waiting: list[Candidate], curve: Curve, had: dict[Flow, float] | None = None) -> list[int]:
    turns = Turns()
    turns.wait({candidate.flow for candidate in waiting}, 0.0)
    for flow, spent in (had or {}).items():
        turns.charge(flow, spent)
    return fair_tick(waiting, turns, lanes_of(curve, max_tick_s=8.0), lambda load: load.rows)


def test_a_tick_mixes_sizes_of_one_model_and_no_models() -> None:
    waiting = [image(SMALL), image(LARGE), image(OTHER_MODEL), image(LARGE)]
    assert sorted(tick(waiting, launches)) == [0, 1, 3]
    assert tick([image(OTHER_MODEL), image(SMALL)], launches) == [0]


def test_whoever_is_ahead_brings_other_sizes_along_where_that_costs_little() -> None:
    ahead = [image(LARGE, SOMEBODY)] * 12
    had = {Flow(SOMEBODY, LARGE): 90.0}
    chosen = tick([*[image(SMALL)] * 4, *ahead], until_full, had)
    # Eight rows of the larger size take half as long again as four of the smaller.
    assert (chosen[:4], len(chosen)) == ([0, 1, 2, 3], 8)
    waiting = [*[image(SMALL)] * 4, *[image(LARGE)] * 4, *ahead]
    assert set(range(8)) <= set(tick(waiting, until_full, had)), "those who are due go first"


def test_images_of_a_group_join_together_or_not_at_all() -> None:
    group = [image(LARGE, group=1, age=9.0)] * 3
    waiting = [*[image(SMALL, remaining=0.1)] * 14, *group]
    assert set(tick(waiting, launches)).isdisjoint({14, 15, 16})
    assert {*range(12, 15)} <= set(tick(waiting[2:], launches))
    chosen = tick(waiting[2:], launches)
    places = [chosen.index(i) for i in range(12, 15)]
    assert all(after == before + 1 for before, after in pairwise(places))


def shared(rows: int) -> float:
    """A GPU that four rows leave half empty."""
    return max(0.02, 0.0025 * rows)


def test_clients_of_two_sizes_have_equal_seconds_and_more_rows_than_apart() -> None:
    senders = [
        Sender(ANONYMOUS, stages=20, at_once=2),
        Sender(SOMEBODY, stages=20, at_once=2, lane=1),
    ]
    curves: dict[int, Curve] = {0: shared, 1: lambda rows: 1.2 * shared(rows)}
    apart = Device(senders, curves, fairly).run(30)
    mixed = Device(senders, curves, fairly, areas={0: 10, 1: 12}).run(30)
    assert jain(list(mixed.seconds.values())) > 0.98
    for lane in curves:
        assert mixed.rows[lane] > 1.5 * apart.rows[lane]

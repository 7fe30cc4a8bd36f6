"""Which ordinary images a tick takes, given what their clients have received so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.engine.client import ANONYMOUS, Client, Flow
from server.engine.fair_queue import Turns
from server.engine.fair_tick import MAX_STRETCH, fair_tick
from server.engine.scheduler import AGEING, BATCH_WAIT_S, Candidate, LaneCosts, Priority

SOMEBODY = Client("somebody")
ELSEWHERE = Flow(Client("elsewhere"), 0)
"""A client that has received nothing; its images wait for the decoder, so none can run."""


def candidate(client: Client, lane: int, **fields: Any) -> Candidate:
    return Candidate(lane=lane, flow=Flow(client, lane), **fields)


candidates = st.lists(
    st.builds(
        candidate,
        rows=st.integers(1, 2),
        remaining=st.floats(0.1, 200),
        age=st.floats(0, 5000),
        priority=st.sampled_from([Priority.INTERACTIVE, Priority.BATCH]),
        lane=st.integers(0, 2),
        client=st.sampled_from([ANONYMOUS, SOMEBODY]),
    ),
    max_size=30,
)


def of(remaining: float, age: float = 0, rows: int = 1, **more: Any) -> Candidate:
    fields: dict[str, Any] = {"priority": Priority.INTERACTIVE, "lane": 0, **more}
    return Candidate(rows=rows, remaining=remaining, age=age, **fields)


def flat(_: int) -> float:
    return 1.0


def each(rows: int) -> float:
    return float(rows)


def select(
    waiting: list[Candidate],
    rows: int,
    seconds: Callable[[int], float] = flat,
    had: dict[Flow, float] | None = None,
    max_tick_s: float = 1.0,
) -> list[int]:
    """The images of a tick of this many rows, at most 16."""
    turns = Turns()
    turns.wait({candidate.flow for candidate in waiting} | {ELSEWHERE}, 0.0)
    for flow, spent in (had or {}).items():
        turns.charge(flow, spent)
    lanes = {lane: LaneCosts(rows, seconds, max_tick_s) for lane in range(3)}
    return fair_tick(waiting, turns, lanes, lambda _: rows)


flows = st.builds(Flow, st.sampled_from([ANONYMOUS, SOMEBODY]), st.integers(0, 2))


@given(candidates, st.integers(2, 16), st.dictionaries(flows, st.floats(0, 1000)))
def test_a_tick_keeps_the_budget_and_one_lane_and_leaves_no_room_unused(waiting, budget, had):
    chosen = select(waiting, budget, had=had)
    used = sum(waiting[i].rows for i in chosen)
    assert used <= budget
    assert len(set(chosen)) == len(chosen)
    assert len({waiting[i].lane for i in chosen}) <= 1
    assert bool(chosen) == bool(waiting)
    if chosen:
        lane = waiting[chosen[0]].lane
        left = [c for i, c in enumerate(waiting) if i not in chosen and c.lane == lane]
        assert all(c.rows > budget - used for c in left)


def test_shortest_remaining_work_goes_first():
    assert select([of(50), of(3), of(20)], 2) == [1, 2]


def test_a_single_row_fills_the_room_that_a_pair_does_not_fit_in():
    assert select([of(4, rows=2), of(6, rows=2), of(8, rows=1)], 3) == [0, 2]


def test_interactive_goes_before_batch():
    assert select([of(5, priority=Priority.BATCH), of(90)], 8) == [1, 0]


def test_batch_images_do_not_lengthen_a_tick_of_interactive_ones_by_more_than_half():
    waiting = [*[of(5, priority=Priority.BATCH)] * 8, of(9, rows=4)]
    chosen = select(waiting, 12, seconds=each, max_tick_s=8)
    assert chosen[0] == 8
    assert len(chosen) == 1 + 4 * (MAX_STRETCH - 1)


def test_a_long_image_does_not_starve_under_an_endless_stream_of_short_ones():
    """Short images arrive at the rate they are served; the long one still ends in bounded time."""
    long_one, tick_s = 100, 0.1
    ticks = 0
    limit = int(2 * 100 / AGEING)
    while long_one and ticks < limit:
        waiting = [of(long_one * tick_s, age=ticks * tick_s), of(4 * tick_s), of(4 * tick_s)]
        long_one -= 0 in select(waiting, 2)
        ticks += 1
    assert long_one == 0
    assert ticks > 100, "the short ones were to go first at all"


def test_batch_work_overtakes_new_interactive_work_in_the_end():
    assert select([of(10, priority=Priority.BATCH), of(4)], 1) == [1]
    assert select([of(10, age=BATCH_WAIT_S, priority=Priority.BATCH), of(4)], 1) == [0]


def test_the_client_that_has_had_least_goes_first_however_long_its_images_are():
    here, there = Flow(ANONYMOUS, 0), Flow(SOMEBODY, 0)
    waiting = [of(1, flow=here), of(50, flow=there)]
    assert select(waiting, 1, had={here: 0.5}) == [1]
    assert select(waiting, 1, had={there: 0.5}) == [0]


def test_whoever_is_ahead_comes_along_where_that_costs_little():
    ahead, due = Flow(ANONYMOUS, 0), Flow(SOMEBODY, 0)
    waiting = [*[of(1, flow=ahead)] * 8, *[of(9, flow=due)] * 4]
    had = {ahead: 9.0}
    assert len(select(waiting, 12, seconds=flat, had=had)) == 12
    chosen = select(waiting, 12, seconds=each, had=had, max_tick_s=8)
    assert chosen[:4] == [8, 9, 10, 11]
    assert len(chosen) == 4 * MAX_STRETCH


def test_large_pictures_and_small_ones_of_a_client_take_turns_by_seconds():
    large, small = Flow(ANONYMOUS, "large"), Flow(ANONYMOUS, "small")
    waiting = [of(9, lane=0, flow=large), of(50, lane=1, flow=small)]
    assert select(waiting, 4, had={large: 0.1}) == [1]
    assert select(waiting, 4, had={small: 0.1}) == [0]

from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import AGEING, Candidate, Priority, select

candidates = st.lists(
    st.builds(
        Candidate,
        rows=st.integers(1, 2),
        remaining=st.integers(1, 200),
        age=st.integers(0, 5000),
        priority=st.sampled_from([Priority.INTERACTIVE, Priority.BATCH]),
        lane=st.integers(0, 2),
    ),
    max_size=30,
)


def of(remaining: int, age: int = 0, rows: int = 1, **more: int) -> Candidate:
    fields = {"priority": Priority.INTERACTIVE, "lane": 0, **more}
    return Candidate(rows=rows, remaining=remaining, age=age, **fields)  # type: ignore[arg-type]


@given(candidates, st.integers(2, 16))
def test_a_tick_keeps_the_budget_and_one_lane_and_leaves_no_room_unused(waiting, budget):
    chosen = select(waiting, budget)
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


def test_a_long_image_does_not_starve_under_an_endless_stream_of_short_ones():
    """Short images arrive at the rate they are served; the long one still ends in bounded time."""
    long_one = 100
    ticks = 0
    limit = int(2 * 100 / AGEING)
    while long_one and ticks < limit:
        chosen = select([of(long_one, age=ticks), of(4), of(4)], 2)
        long_one -= 0 in chosen
        ticks += 1
    assert long_one == 0
    assert ticks > 100, "the short ones were to go first at all"


def test_batch_work_overtakes_new_interactive_work_in_the_end():
    assert select([of(10, priority=Priority.BATCH), of(4)], 1) == [1]
    assert select([of(10, age=5000, priority=Priority.BATCH), of(4)], 1) == [0]

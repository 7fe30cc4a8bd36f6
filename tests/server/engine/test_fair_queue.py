"""The arithmetic of fair turns."""

from __future__ import annotations

from itertools import count

import pytest

from server.engine.client import Client, Flow
from server.engine.fair_queue import BURST_S, FLOW_EXPIRY_S, FairQueue, Turns

A, B, HEAVY = Client("a"), Client("b"), Client("heavy", weight=3.0)


def of_clients() -> FairQueue[Client]:
    return FairQueue(lambda client: client.weight)


def served(queue: FairQueue[Client], waiting: list[Client], seconds: float) -> dict[Client, float]:
    """Seconds that each client gets of this many, in ticks of a tenth of a second."""
    had = dict.fromkeys(waiting, 0.0)
    for _ in range(round(seconds / 0.1)):
        queue.wait(waiting)
        first = min(waiting, key=queue.virtual_time)
        queue.charge(first, 0.1)
        had[first] += 0.1
    return had


def test_those_with_work_share_by_their_weights():
    had = served(of_clients(), [A, B, HEAVY], 10)
    assert had[A] == pytest.approx(2, abs=0.11)
    assert had[B] == pytest.approx(2, abs=0.11)
    assert had[HEAVY] == pytest.approx(6, abs=0.11)


def test_whoever_was_away_is_owed_the_burst_and_not_all_that_it_left():
    queue = of_clients()
    served(queue, [A], 100)
    back = served(queue, [A, B], 10)
    assert back[B] - back[A] == pytest.approx(BURST_S, abs=0.11)


def test_the_burst_of_a_heavy_client_takes_no_more_seconds_of_the_others() -> None:
    """Its weight alone would give it the device to itself for 200 s."""
    queue, heaviest = of_clients(), Client("heaviest", weight=100.0)
    served(queue, [A], 100)
    back = served(queue, [A, heaviest], 101)
    assert back[A] == pytest.approx((101 - BURST_S) / 101, abs=0.11)
    # A light client has its part of the burst, then a third of the rest.
    light = Client("light", weight=0.5)
    part = BURST_S * light.weight
    assert served(queue, [A, light], 4)[light] == pytest.approx(part + (4 - part) / 3, abs=0.21)


def test_to_leave_and_come_back_earns_nothing_beyond_the_burst():
    queue = of_clients()
    total = {A: 0.0, B: 0.0}
    for _ in range(50):
        for client, seconds in served(queue, [A, B], 4).items():
            total[client] += seconds
        queue.wait([A])
    assert total[B] - total[A] <= BURST_S + 0.11


def test_whoever_is_ahead_stays_ahead_over_a_pause():
    queue = of_clients()
    queue.wait([A, B])
    queue.charge(B, 5.0)
    queue.wait([A])
    assert served(queue, [A, B], 4) == {A: pytest.approx(4), B: 0}


def test_a_client_s_flows_share_what_is_its_own():
    turns = Turns()
    flows = [Flow(A, "large"), Flow(A, "small"), Flow(B, "small")]
    had = dict.fromkeys(flows, 0.0)
    for tick in range(400):
        turns.wait(flows, 0.1 * tick)
        first = min(flows, key=turns.virtual_times_of)
        turns.charge(first, 0.1)
        had[first] += 0.1
    assert list(had.values()) == pytest.approx([10, 10, 20], abs=0.3)


def test_others_are_expected_for_a_while_after_their_last_work():
    turns = Turns()
    turns.wait([Flow(A, 0), Flow(B, 0)], 0.0)
    turns.wait([Flow(A, 0)], FLOW_EXPIRY_S - 0.1)
    assert turns.contended
    turns.wait([Flow(A, 0)], FLOW_EXPIRY_S)
    assert not turns.contended


def test_a_client_is_due_unless_it_is_ahead_of_another_by_more_than_a_tick():
    turns = Turns()
    flows = [Flow(A, 0), Flow(B, 0)]
    turns.wait(flows, 0.0)
    turns.charge(flows[0], 1.0)
    assert turns.flow_due(flows[1], within_s=0.1)
    assert not turns.flow_due(flows[0], within_s=0.9)
    assert turns.flow_due(flows[0], within_s=1.0)
    assert not turns.flow_due(Flow(HEAVY, 0), within_s=9.0), "it has no work"


def test_ever_new_sizes_leave_a_flow_that_stays_its_part():
    turns = Turns()
    stays, sizes = Flow(A, "stays"), count()
    left: dict[Flow, int] = {}
    had = 0
    for tick in range(600):
        while len(left) < 2:
            left[Flow(A, next(sizes))] = 10
        turns.wait([stays, *left], 0.1 * tick)
        first = min([stays, *left], key=turns.virtual_times_of)
        turns.charge(first, 0.1)
        if first == stays:
            had += 1
        elif left[first] > 1:
            left[first] -= 1
        else:
            del left[first]
    assert had == pytest.approx(200, abs=3 * BURST_S / 0.1)

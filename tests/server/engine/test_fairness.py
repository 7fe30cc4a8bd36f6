"""The effect of fair turns on a simulated device, compared with first come, first served."""

from __future__ import annotations

from statistics import quantiles

import pytest

from server.engine.client import Client
from tests.server.engine.simulated_device import (
    Choose,
    Curve,
    Device,
    Sender,
    cpu,
    fairly,
    first_come,
    gpu,
    jain,
    large,
)

A, B, C = Client("a"), Client("b"), Client("c")
STEPS = 20
CURVES = pytest.mark.parametrize("curve", [cpu, gpu])


def p95(seconds: list[float]) -> float:
    return quantiles(seconds, n=20, method="inclusive")[-1]


def slowdown(curve: Curve, choose: Choose, pause_s: float = 0.0) -> float:
    """95th percentile of B's latency beside a flood, as a multiple of that alone."""
    one = Sender(B, stages=STEPS, pause_s=pause_s)
    flood = Sender(A, stages=STEPS, at_once=20)
    alone = Device([one], {0: curve}, choose).run(10)
    beside = Device([one, flood], {0: curve}, choose).run(40)
    return p95(beside.latencies[0]) / p95(alone.latencies[0])


@CURVES
@pytest.mark.parametrize("pause_s", [0.0, 1.0])
def test_one_request_at_a_time_takes_at_most_twice_as_long_beside_a_flood(curve, pause_s):
    assert slowdown(curve, fairly, pause_s) <= 2


@CURVES
def test_first_come_first_served_lets_it_wait_for_the_flood(curve):
    assert slowdown(curve, first_come) > 4


UNEQUAL = [
    Sender(A, stages=4, at_once=20),
    Sender(B, stages=30, images=8, lane=1, at_once=2),
    Sender(C, stages=100, at_once=1, images=4),
]
"""Clients that always have work; B's is large pictures."""


def shares(choose: Choose) -> float:
    device = Device(UNEQUAL, {0: gpu, 1: large}, choose).run(120)
    return jain([device.seconds[sender.client] for sender in UNEQUAL])


def test_clients_that_always_have_work_have_equal_seconds_of_the_device():
    assert shares(fairly) >= 0.95


def test_first_come_first_served_gives_them_very_different_ones():
    assert shares(first_come) < 0.6


@CURVES
def test_weights_are_shares_of_the_device(curve):
    weighted = Client("weighted", weight=3.0)
    senders = [Sender(A, at_once=20), Sender(weighted, at_once=20, stages=30)]
    seconds = Device(senders, {0: curve}, fairly).run(60).seconds
    assert seconds[weighted] / seconds[A] == pytest.approx(3, rel=0.1)


@CURVES
def test_fair_turns_keep_the_throughput(curve):
    """Two clients with many requests each, and a third that sends one now and then."""
    senders = [
        Sender(A, at_once=30),
        Sender(B, at_once=30, stages=30),
        Sender(C, stages=STEPS, pause_s=10.0),
    ]
    fair, first = (Device(senders, {0: curve}, one).run(60) for one in (fairly, first_come))
    assert fair.rows[0] / fair.now >= 0.92 * first.rows[0] / first.now


def test_a_large_picture_delays_a_small_one_by_no_more_than_its_tick_under_way():
    """Both are from the same client, as on a server without keys."""
    senders = [Sender(A, stages=2, images=8, lane=1, at_once=2), Sender(A, pause_s=3.0)]
    fair, first = (
        Device(senders, {0: gpu, 1: large}, choose).run(120) for choose in (fairly, first_come)
    )
    alone_s, large_tick_s = 4 * gpu(2), large(2)
    assert max(fair.latencies[1]) <= alone_s + 1.01 * large_tick_s
    assert max(first.latencies[1]) > alone_s + 4 * large_tick_s


def test_a_long_request_has_its_share_under_a_flood_of_short_ones_of_the_same_client():
    """It takes 3.6 s alone; newcomers go first only until it has waited four times as long."""
    senders = [Sender(A, stages=100, at_once=1), Sender(A, stages=4, at_once=60)]
    device = Device(senders, {0: lambda rows: 0.03 + 0.003 * rows}, fairly).run(60)
    assert device.latencies[0][0] < 40

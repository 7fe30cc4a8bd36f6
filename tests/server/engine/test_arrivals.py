"""Frames of live streams overtake other images in the queue; groups stay together."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.backlog import Holding
from server.engine.client import ANONYMOUS, Client
from server.engine.scheduler import Priority
from server.engine.state.arrivals import Arrivals
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.task import Group


@pytest.fixture
def arrived(task, listen):
    def make(client: Client = ANONYMOUS, **fields: Any) -> Sequence:
        return Sequence(
            task(rule="none", **fields), 0, listen(1), Submission(1, Holding(client, 1))
        )

    return make


def test_live_frames_pass_the_others_and_each_kind_has_its_number(arrived):
    ordinary = [arrived() for _ in range(5)]
    live = [arrived(priority=Priority.LIVE) for _ in range(3)]
    queue = Arrivals()
    queue.extend([*ordinary[:3], *live, *ordinary[3:]])
    assert queue.take(2, 2) == [*live[:2], *ordinary[:2]]
    assert list(queue) == [live[2], *ordinary[2:]]
    assert queue.take_all() == [live[2], *ordinary[2:]]
    assert not queue


def test_a_group_is_not_divided(arrived):
    group = Group()
    members = [arrived(group=group) for _ in range(3)]
    queue = Arrivals()
    queue.extend([arrived(), *members, arrived()])
    assert len(queue.take(16, 2)) == 4


def test_a_flood_does_not_hold_up_another_client_or_size(arrived):
    flood = [arrived() for _ in range(9)]
    other, large = arrived(Client("other")), arrived(width=256)
    queue = Arrivals()
    queue.extend([*flood, other, large])
    assert queue.take(0, 4) == [flood[0], other, large, flood[1]]
    late = arrived(Client("late"))
    queue.extend([late])
    assert queue.take(0, 2) == [flood[2], late]


def test_a_flow_whose_next_image_may_not_come_waits_and_keeps_its_order(arrived):
    first, second, other = arrived(), arrived(), arrived(Client("other"))
    queue = Arrivals()
    queue.extend([first, second, other])
    assert queue.take(0, 9, lambda one: one is not first) == [other]
    assert list(queue) == [first, second]

"""Turns in the decoder: live frames go first, but do not starve the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from server.engine.backlog import Holding
from server.engine.client import ANONYMOUS, Client
from server.engine.fair_queue import Turns
from server.engine.scheduler import Priority
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.tick.decoder_queue import LIVE_TURNS, DecoderQueue

Finish: TypeAlias = Callable[..., Sequence]


@pytest.fixture
def finished(task: Callable[..., Any], listen: Callable[..., Any]) -> Finish:
    def make(
        priority: Priority = Priority.INTERACTIVE, client: Client = ANONYMOUS, **fields: Any
    ) -> Sequence:
        one = task(rule="none", priority=priority, **fields)
        sequence = Sequence(one, 0, listen(1), Submission(1, Holding(client, 1)))
        sequence.lane = None  # type: ignore[assignment]
        return sequence

    return make


def next_of(queue: DecoderQueue) -> Sequence:
    """The next image, as a GPU's decoder takes them, one at a time."""
    if queue.live_turn():
        return queue.take_live(1)[0]
    return queue.take_ordinary(lambda _: 1)[0]


def test_ordinary_images_have_every_fourth_turn_however_many_frames_come(finished: Finish) -> None:
    queue = DecoderQueue(Turns())
    for _ in range(3):
        queue.add(finished())
    turns: list[bool] = []
    for _ in range(3 * (LIVE_TURNS + 1)):
        queue.add(finished(Priority.LIVE))
        queue.add(finished(Priority.LIVE))
        turns.append(next_of(queue).live)
    assert turns == ([True] * LIVE_TURNS + [False]) * 3


def test_an_image_that_finishes_late_is_not_owed_the_turns_before_it(finished: Finish) -> None:
    queue = DecoderQueue(Turns())
    for _ in range(2 * LIVE_TURNS):
        queue.add(finished(Priority.LIVE))
    for _ in range(LIVE_TURNS):
        next_of(queue)
    queue.add(finished())
    assert [next_of(queue).live for _ in range(len(queue))] == [True] * LIVE_TURNS + [False]


def test_each_kind_keeps_the_order_in_which_it_finished(finished: Finish) -> None:
    queue = DecoderQueue(Turns())
    first, second, third = (finished() for _ in range(3))
    frame = finished(Priority.LIVE)
    for one in (first, second, frame, third):
        queue.add(one)
    assert queue.drop(second)
    assert not queue.drop(second)
    assert [next_of(queue) for _ in range(len(queue))] == [frame, first, third]


def test_flows_take_turns_by_what_they_have_had(finished: Finish) -> None:
    somebody = Client("somebody")
    turns = Turns()
    queue = DecoderQueue(turns)
    large = [finished(width=1024, height=1024) for _ in range(2)]
    small, others = finished(), finished(client=somebody)
    for one in (*large, small, others):
        queue.add(one)
    turns.wait({one.flow for one in (*large, small, others)}, 0.0)
    turns.charge(large[0].flow, 1.0)
    assert [next_of(queue) for _ in range(4)] == [others, small, *large]


def test_a_flow_that_has_to_wait_is_passed(finished: Finish) -> None:
    turns = Turns()
    queue = DecoderQueue(turns)
    first, second = finished(), finished(client=Client("somebody"))
    for one in (first, second):
        queue.add(one)
    assert queue.take_ordinary(lambda one: int(one is second)) == [second]
    assert queue.take_ordinary(lambda _: 0) == []
    assert len(queue) == 1


@pytest.mark.parametrize("priority", [Priority.LIVE, Priority.INTERACTIVE])
def test_images_of_one_call_have_one_autoencoder(finished: Finish, priority: Priority) -> None:
    queue = DecoderQueue(Turns())
    first, second, third = (finished(priority, tiny=tiny) for tiny in (False, True, True))
    for one in (first, second, third):
        queue.add(one)
    take = queue.take_live if priority is Priority.LIVE else queue.take_ordinary
    many: Any = 4 if priority is Priority.LIVE else lambda _: 4
    assert [take(many), take(many)] == [[first], [second, third]]

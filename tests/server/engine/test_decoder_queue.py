"""Whose turn it is in the decoder: live frames go first and do not starve the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from server.engine.scheduler import Priority
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.tick.decoder_queue import LIVE_TURNS, DecoderQueue

Finish: TypeAlias = Callable[..., Sequence]


@pytest.fixture
def finished(task: Callable[..., Any], listen: Callable[..., Any]) -> Finish:
    def make(priority: Priority = Priority.INTERACTIVE) -> Sequence:
        return Sequence(task(rule="none", priority=priority), 0, listen(1), Submission(1), 0)

    return make


def test_ordinary_images_have_every_fourth_turn_however_many_frames_come(finished: Finish) -> None:
    queue = DecoderQueue()
    for _ in range(3):
        queue.add(finished())
    turns: list[bool] = []
    for _ in range(3 * (LIVE_TURNS + 1)):
        queue.add(finished(Priority.LIVE))
        queue.add(finished(Priority.LIVE))
        turns.append(queue.turn().popleft().live)
    assert turns == ([True] * LIVE_TURNS + [False]) * 3


def test_an_image_that_finishes_late_is_not_owed_the_turns_before_it(finished: Finish) -> None:
    queue = DecoderQueue()
    for _ in range(2 * LIVE_TURNS):
        queue.add(finished(Priority.LIVE))
    for _ in range(LIVE_TURNS):
        queue.turn().popleft()
    queue.add(finished())
    assert [queue.turn().popleft().live for _ in range(len(queue))] == [True] * LIVE_TURNS + [False]


def test_each_kind_keeps_the_order_in_which_it_finished(finished: Finish) -> None:
    queue = DecoderQueue()
    first, second, third = (finished() for _ in range(3))
    frame = finished(Priority.LIVE)
    for one in (first, second, frame, third):
        queue.add(one)
    assert queue.drop(second)
    assert not queue.drop(second)
    assert [queue.turn().popleft() for _ in range(len(queue))] == [frame, first, third]

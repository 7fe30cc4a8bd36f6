"""Room is claimed before any work is done; a task is either cancelled or gives a picture."""

from __future__ import annotations

from dataclasses import replace
from threading import Event, Thread

import pytest
import torch

from server.engine.backlog import Amounts
from server.engine.client import ANONYMOUS
from server.engine.cost_model import TickCost
from server.engine.footprint import footprint
from server.engine.scheduler import Priority
from server.engine.state.submission import Submission
from server.errors import Cancelled, NotReady, Overloaded
from tests.server.engine.conftest import PATIENCE_S


def test_room_is_taken_before_there_are_any_tasks(start, task, listen):
    engine = start(max_pending=3)
    with engine.reserve(3) as room:
        with pytest.raises(Overloaded) as refusal:
            engine.reserve(1)
        assert refusal.value.retry_after_s >= 1
        heard = listen(2)
        room.submit([task(steps=1, seed=seed) for seed in (1, 2)], heard)
        assert not heard.wait().errors
        with pytest.raises(ValueError, match="tasks are 2; room is reserved for 1"):
            room.submit([task(), task()], listen(2))
    assert engine.measurements.pending == 0
    assert engine.measurements.refused == 1


def test_a_queue_full_of_ordinary_images_has_room_for_live_ones(start, task, listen):
    engine = start(max_pending=2)
    frame = replace(task(rule="none", steps=1), priority=Priority.LIVE)
    with engine.reserve(2), pytest.raises(Overloaded):
        engine.reserve(1)
    with engine.reserve(2):
        heard = listen(2)
        engine.submit([frame, frame], heard)
        assert not heard.wait().errors
        with engine.reserve(2, live=True) as room:
            with pytest.raises(Overloaded):
                engine.reserve(1, live=True)
            with pytest.raises(ValueError, match="either for live images or for others"):
                room.submit([task()], listen(1))
        engine.reserve(2, live=True).release()
        assert engine.waiting()[ANONYMOUS].images == 2, "frames that never came take no part of it"
    assert (engine.measurements.pending, engine.measurements.live_pending) == (0, 0)


def test_room_is_given_back_once_whatever_happens(start, task, listen):
    engine = start(max_pending=3)
    room = engine.reserve(2)
    room.release()
    room.release()
    assert engine.measurements.pending == 0
    with pytest.raises(ZeroDivisionError), engine.reserve(3):
        raise ZeroDivisionError
    assert engine.measurements.pending == 0
    late = engine.reserve(1)
    engine.stop(0)
    with pytest.raises(NotReady), late:
        late.submit([task()], listen(1))
    assert engine.measurements.pending == 0
    with pytest.raises(NotReady):
        engine.reserve(1)


def test_what_is_claimed_after_the_room_was_given_back_is_counted_by_nobody(start, task):
    """A thread may do so if its request was cancelled meanwhile."""
    engine = start(max_pending=3)
    with engine.reserve(1):
        room = engine.reserve(1)
        room.release()
        with pytest.raises(ValueError, match="was released"):
            room.claim([task(steps=40)])
        assert engine.waiting()[ANONYMOUS] == Amounts(images=1)


def test_room_is_taken_by_what_images_cost_and_given_back_as_they_are_made(
    start, task, listen, monkeypatch
):
    # The real time of ticks changes with other work of the machine, so it must not be learned.
    monkeypatch.setattr(TickCost, "observe", lambda *_: 1.0)
    engine = start(max_pending_s=2.0, guessed_costs={1: 0.01, 128: 1.28})
    heard, asked = [listen(1) for _ in range(2)], Event()
    for each in heard:
        each.on_start = lambda: asked.wait(PATIENCE_S)
    running = [engine.submit([task(steps=400)], each) for each in heard]
    waiting = engine.waiting()[ANONYMOUS]
    assert waiting.images == 2
    assert waiting.seconds == pytest.approx(2.0, rel=0.1), "a request counts for half at most"
    with engine.reserve(1) as room, pytest.raises(Overloaded):
        room.claim([task(steps=400, width=512, height=512)])
    for submission in running:
        submission.cancel()
    asked.set()
    for each in heard:
        each.wait()
    assert engine.waiting() == {}
    assert engine.spent()[ANONYMOUS] > 0


def test_the_footprint_of_a_request_counts_its_shared_pictures_once(task, model):
    picture = torch.zeros(3, 128, 128)
    about = {"steps": 3, "strength": 1, "image": picture, "width": 128, "height": 128}
    tasks = [task(seed=seed, **about) for seed in (1, 2)]
    kind = "embedded", (4, 16, 16)
    needed = footprint(tasks, lambda _: kind, lambda *_: 1000)
    assert needed.rows == {kind: 2 * 3 * 2}
    state, texts = 4 * 4 * 16 * 16 * (tasks[0].plan.slots + 2), 2 * 1000
    assert needed.nbytes == 2 * (state + 3 * 128 * 128) + texts + picture.nbytes


def test_of_a_cancellation_and_the_last_picture_one_wins():
    for round_ in range(200):
        submission = Submission(1)
        won: dict[str, bool] = {}
        racers = [
            Thread(target=lambda s=submission, w=won: w.update(cancel=s.cancel())),
            Thread(target=lambda s=submission, w=won: w.update(finish=s.finish())),
        ]
        for racer in racers[:: 1 if round_ % 2 else -1]:
            racer.start()
        for racer in racers:
            racer.join()
        assert won["cancel"] != won["finish"]


def test_a_cancellation_during_decoding_leaves_no_picture(start, model, task, listen):
    class Slow:
        """The real model, with a cancellation while it decodes."""

        def __init__(self):
            self.meanwhile = lambda: None

        def __getattr__(self, name):
            return getattr(model, name)

        def decode(self, latents):
            self.meanwhile()
            return model.decode(latents)

    slow, heard = Slow(), listen(2)
    engine = start(model=slow)
    submission = engine.submit([task(steps=1, seed=seed) for seed in (1, 2)], heard)
    answers: list[bool] = []
    slow.meanwhile = lambda: answers.append(submission.cancel())
    heard.wait()
    assert answers[0]
    assert [type(error) for error in heard.errors.values()] == [Cancelled] * 2
    assert engine.measurements.images == 0


def test_what_is_finished_can_no_longer_be_cancelled(engine, task, listen):
    heard = listen(1)
    submission = engine.submit([task(steps=1)], heard)
    heard.wait()
    assert not submission.cancel()

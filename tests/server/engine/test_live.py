"""Frames of live streams beside ordinary images, in the real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

from server.engine.cost_model import TickCost
from server.engine.live_share import ORDINARY_SHARE
from server.engine.metrics import EngineMeasurements
from server.engine.scheduler import Load, Priority
from server.engine.selection import Selection
from server.engine.state.lane import Lane
from server.engine.state.sequence import ImageResult
from server.engine.task import ImageTask, Stream
from tests.server.engine.conftest import PATIENCE_S
from tests.server.engine.test_decode import Diary, between_ticks

FRAMES = 12


class Client:
    """Submits another frame whenever one comes back, so that four are always in progress."""

    def __init__(self, engine: Any, task: ImageTask) -> None:
        self._engine = engine
        self._task = replace(task, priority=Priority.LIVE, stream=Stream())
        self._began = 0
        self.frames = 0
        self.failures: list[Exception] = []
        self.on_end: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._began = 4
        for _ in range(4):
            self._engine.submit([self._task], self)

    def started(self, index: int) -> None: ...

    def progress(self, *said: Any) -> None: ...

    def finished(self, index: int, result: ImageResult) -> None:
        self.frames += 1
        if self._began < FRAMES:
            self._began += 1
            self._engine.submit([self._task], self)
        elif self.frames == FRAMES - 3:
            self.on_end()

    def failed(self, index: int, error: Exception) -> None:
        self.failures.append(error)
        self.on_end()


def test_streams_share_equally_and_ordinary_images_get_their_part(start, task, listen):
    engine = start(row_budget=8)
    frame = task(sampler="lcm", rule="none", steps=4, width=64, height=64)
    clients = [Client(engine, frame) for _ in range(3)]
    backlog, ended = listen(30), Event()
    evaluations: list[int] = []
    counts: list[int] = []
    in_progress = list(clients)

    def begin() -> None:
        evaluations.append(engine.measurements.evaluations)
        for client in clients:
            client.start()

    def end() -> None:
        in_progress.pop()
        if not in_progress:
            evaluations.append(engine.measurements.evaluations)
            counts.extend(client.frames for client in clients)
            ended.set()

    # All in the engine's thread: between two ticks of it, another thread might be late.
    backlog.on_start = begin
    for client in clients:
        client.on_end = end
    submission = engine.submit([task(rule="none", steps=50, width=64, height=64)] * 30, backlog)
    assert ended.wait(PATIENCE_S)
    submission.cancel()
    backlog.wait()
    rows = evaluations[1] - evaluations[0]
    assert min(counts) >= 0.8 * max(counts)
    assert not any(client.failures for client in clients)
    ordinary = rows - 4 * sum(counts)
    assert 0.5 * ORDINARY_SHARE < ordinary / rows < 2 * ORDINARY_SHARE
    latencies = engine.measurements.latencies
    assert sum(latencies[Priority.LIVE].counts) >= sum(counts)
    assert latencies[Priority.LIVE].total_s > 0


def test_a_live_frame_goes_before_the_queue_that_it_finds(start, task, listen):
    engine = start(row_budget=4)
    queue, frame = listen(60), listen(1)
    live = replace(task(rule="none", steps=2), priority=Priority.LIVE)
    before: list[int] = []
    queue.on_start = lambda: engine.submit([live], frame)
    frame.on_end = lambda: before.append(len(queue.results))
    submission = engine.submit([task(rule="none", steps=9)] * 60, queue)
    frame.wait()
    submission.cancel()
    queue.wait()
    assert before[0] < 10


def test_live_frames_that_finish_together_are_all_decoded_before_the_next_tick(
    start, model, task, listen
):
    diary = Diary(model)
    engine = start(model=diary, row_budget=12)
    diary.entries.clear()
    ordinary, live = listen(1), listen(6)
    frame = replace(task(rule="none", steps=1), priority=Priority.LIVE)
    ordinary.on_start = lambda: engine.submit([frame] * 6, live)
    engine.submit([task(rule="none", steps=6)], ordinary)
    ordinary.wait()
    live.wait()
    assert [call for call in between_ticks(diary.entries) if call] == [[1] * 6, [1]]


def test_where_every_tick_takes_long_live_ticks_still_have_enough_rows(model):
    """Ticks of one row would be the shortest, but then all frames would be late."""
    selection = Selection(EngineMeasurements(row_budget=12), live_tick_s=0.0001)
    cost = TickCost({1: 0.5, 12: 1.0})
    lane = Lane(model, (4, 16, 16), cost, max_rows=12)
    rows = selection.rows_of_tick(Load(lane=0, rows=16, widest=1, live=True), lane)
    assert rows / cost.seconds(rows) >= 0.8 * 12 / cost.seconds(12)

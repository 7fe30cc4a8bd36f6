"""Live streams and ordinary images share the device as promised, in simulations."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.client import ANONYMOUS, ANY_FLOW, Flow
from server.engine.fair_queue import Turns
from server.engine.fair_tick import fair_tick
from server.engine.live_share import ORDINARY_SHARE, Shares, share_tick
from server.engine.scheduler import Candidate, LaneCosts, Load, Priority, rows_of_tick

MAX_ROWS = 128
LIVE_TICK_S = 0.1


def cpu(rows: int) -> float:
    """Large ticks cost a little less a row."""
    return 0.004 + 0.007 * rows


def gpu(rows: int) -> float:
    """Small ticks all cost the same."""
    return max(0.023, 0.01 + 0.0033 * rows)


CURVES = (cpu, gpu)
Curve = Callable[[int], float]


def rows_of(load: Load, curve: Curve) -> int:
    return rows_of_tick(load, MAX_ROWS, curve, LIVE_TICK_S, tick=1)


@dataclass
class Image:
    """An image in progress; an ordinary one if ``stream`` is None."""

    rows: int
    left: int
    lane: int
    stream: int | None
    priority: Priority
    began: float


@dataclass
class Stream:
    """A client that always has one frame in progress for each of its stages."""

    stages: int = 4
    rows: int = 1
    lane: int = 0


@dataclass
class Simulation:
    """Simulates the engine's choice of ticks with a cost curve.

    Each finished image takes ``decode_s`` more; nothing else takes time.
    """

    streams: list[Stream]
    curves: dict[int, Curve] = field(default_factory=lambda: {0: cpu})
    decode_s: float = 0.0
    waiting: deque[Image] = field(default_factory=deque[Image])
    now: float = 0.0
    ticks: int = 0
    shares: Shares = field(default_factory=Shares)
    turns: Turns = field(default_factory=Turns)
    frames: Counter[int] = field(default_factory=Counter[int])
    latencies: list[float] = field(default_factory=list[float])
    seconds: defaultdict[int | None, float] = field(default_factory=lambda: defaultdict(float))
    done: list[Image] = field(default_factory=list[Image])

    def ordinary(self, count: int, *, left: int = 20, rows: int = 2, lane: int = 0) -> None:
        """Put ordinary images in the queue."""
        for _ in range(count):
            self.waiting.append(Image(rows, left, lane, None, Priority.INTERACTIVE, self.now))

    def run(self, seconds: float) -> Simulation:
        """Simulate this many seconds."""
        until = self.now + seconds
        while self.now < until:
            under_way = Counter(image.stream for image in self.waiting)
            for number, stream in enumerate(self.streams):
                # One joins in each tick, so that frames are at different stages.
                if under_way[number] < stream.stages:
                    self.waiting.append(self._frame(number, stream))
            self._tick()
        return self

    def _frame(self, number: int, stream: Stream) -> Image:
        about = stream.rows, stream.stages, stream.lane, number, Priority.LIVE
        return Image(*about, self.now)

    def _tick(self) -> None:
        images = list(self.waiting)
        candidates = [self._candidate(image) for image in images]
        ordinary = {candidate.flow for candidate in candidates if candidate.stream is None}
        self.turns.wait(ordinary, self.now)
        lanes = {
            lane: LaneCosts(MAX_ROWS, curve, LIVE_TICK_S) for lane, curve in self.curves.items()
        }

        def rows_for(load: Load) -> int:
            return rows_of(load, self.curves[load.lane])

        if any(image.stream is not None for image in images):
            about = candidates, self.shares, self.turns, lanes, rows_for
            chosen, self.shares = share_tick(*about)
        else:
            chosen = fair_tick(candidates, self.turns, lanes, rows_for)
        ran = [images[i] for i in chosen]
        assert len({image.lane for image in ran}) == 1
        rows = sum(image.rows for image in ran)
        took = self.curves[ran[0].lane](rows)
        self.now += took
        self.ticks += 1
        for image in ran:
            self.seconds[image.stream] += took * image.rows / rows
            if image.stream is None:
                self.turns.charge(Flow(ANONYMOUS, image.lane), took * image.rows / rows)
            image.left -= 1
            if not image.left:
                self.waiting.remove(image)
                self._end(image)

    def _candidate(self, image: Image) -> Candidate:
        return Candidate(
            rows=image.rows,
            remaining=0.01 * image.left,
            age=self.now - image.began,
            priority=image.priority,
            lane=image.lane,
            stream=image.stream,
            flow=Flow(ANONYMOUS, image.lane),
        )

    def _end(self, image: Image) -> None:
        self._decode(image)
        if image.stream is None:
            self.done.append(image)
        else:
            self.frames[image.stream] += 1
            self.latencies.append(self.now - image.began)

    def _decode(self, image: Image) -> None:
        self.now += self.decode_s
        self.seconds[image.stream] += self.decode_s
        live = image.stream is not None
        if not all(other.stream is not None for other in self.waiting):
            live_s, ordinary_s = (self.decode_s, 0.0) if live else (0.0, self.decode_s)
            self.shares = self.shares.after(live_s=live_s, ordinary_s=ordinary_s)

    def fps(self, stream: int) -> float:
        return self.frames[stream] / self.now

    def p95(self) -> float:
        return quantiles(self.latencies, n=20)[-1]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("count", [2, 8, 40])
def test_equal_streams_get_equal_frames(curve: Curve, count: int):
    """This also holds where the bound on a tick's time is too short for all of them."""
    ran = Simulation([Stream()] * count, {0: curve}).run(20)
    frames = [ran.frames[i] for i in range(count)]
    assert min(frames) >= 0.95 * max(frames) - 1


@pytest.mark.parametrize("heavy", [Stream(rows=2), Stream(stages=20, rows=2)])
def test_a_heavy_stream_takes_no_more_than_its_part_of_the_device(heavy: Stream):
    ran = Simulation([Stream(), Stream(), heavy]).run(20)
    parts = [ran.seconds[i] for i in range(3)]
    assert min(parts) >= 0.9 * max(parts)
    alone = Simulation([Stream(), Stream(), Stream()]).run(20)
    assert ran.fps(0) >= 0.85 * alone.fps(0)


def test_streams_of_other_sizes_and_models_have_their_part_too():
    """One lane has three streams; of two more lanes, one has ticks that exceed the bound."""
    curves = {0: cpu, 1: gpu, 2: lambda rows: 0.4 * rows}
    streams = [Stream()] * 3 + [Stream(lane=1), Stream(lane=2)]
    ran = Simulation(streams, curves).run(100)
    parts = [ran.seconds[i] for i in range(5)]
    assert min(parts) >= 0.9 * max(parts)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("count", [1, 4])
def test_beside_ordinary_images_live_frames_take_at_most_half_as_long_again(
    curve: Curve, count: int
):
    alone = Simulation([Stream()] * count, {0: curve}).run(20)
    beside = Simulation([Stream()] * count, {0: curve})
    beside.ordinary(50)
    beside.run(20)
    assert beside.p95() <= 1.5 * alone.p95()
    assert beside.seconds[None] >= ORDINARY_SHARE * beside.now * 0.9


def test_rows_that_cost_live_frames_nothing_are_given_to_ordinary_images():
    """Up to seven rows cost as much as four; only further rows count against the share."""
    alone = Simulation([Stream()], {0: lambda rows: 0.02 if rows <= 7 else 9.0}).run(10)
    beside = Simulation([Stream()], {0: lambda rows: 0.02 if rows <= 7 else 9.0})
    beside.ordinary(50, rows=3)
    beside.run(10)
    assert beside.frames == alone.frames
    assert len(beside.done) * 20 >= 0.95 * beside.ticks


def test_where_every_tick_has_the_same_rows_those_that_are_free_are_given_away():
    """All ticks have the same rows in deterministic mode."""
    live = [Candidate(1, left, 0, Priority.LIVE, 0, stream=1) for left in (2, 3)]
    ordinary = [Candidate(2, 9, 0, Priority.INTERACTIVE, 0) for _ in range(5)]
    fixed = LaneCosts(8, lambda _: 0.05, LIVE_TICK_S)
    turns = Turns()
    turns.wait({ANY_FLOW}, 0.0)
    chosen, _ = share_tick([*live, *ordinary], Shares(), turns, {0: fixed}, lambda _: 8)
    assert sorted(chosen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("lane", [0, 1])
def test_ordinary_images_get_their_share_however_many_streams_there_are(count: int, lane: int):
    """In the streams' own lane, and in a lane of another size, whose ticks exceed the bound."""
    ran = Simulation([Stream()] * count, {0: cpu, 1: lambda rows: 0.3 * rows})
    ran.ordinary(50, lane=lane)
    ran.run(20)
    share = ran.seconds[None] / ran.now
    assert share == pytest.approx(ORDINARY_SHARE, rel=0.2)


def test_what_is_done_beside_the_ticks_counts_too():
    """Images with few steps take longer in the decoder than in the denoiser."""
    ran = Simulation([Stream()], decode_s=0.05)
    ran.ordinary(300, left=1)
    ran.run(20)
    assert ran.seconds[None] / ran.now == pytest.approx(ORDINARY_SHARE, rel=0.2)


def test_an_image_wider_than_what_live_frames_leave_is_paid_for_in_the_end():
    """Those behind it must not use up the credit that it waits for."""
    ran = Simulation([Stream()] * 3)
    ran.ordinary(1, left=1, rows=13)
    ran.ordinary(200, left=10, rows=1)
    ran.run(20)
    assert 13 in [image.rows for image in ran.done]


def test_ordinary_images_of_another_lane_are_not_starved_by_those_beside_the_streams():
    ran = Simulation([Stream()], {0: cpu, 1: cpu})
    ran.ordinary(1, left=50, lane=1)
    for _ in range(60):
        ran.ordinary(4, left=4)
        ran.run(0.5)
    assert any(image.lane == 1 for image in ran.done)


def test_a_batch_image_never_overtakes_live_ones_but_ends():
    ran = Simulation([Stream()])
    ran.waiting.append(Image(1, 10, 0, None, Priority.BATCH, -100_000))
    ran.run(20)
    assert len(ran.done) == 1
    assert ran.fps(0) >= 0.7 * Simulation([Stream()]).run(20).fps(0)


def test_a_stream_that_was_away_is_owed_nothing():
    """It does not get the device to itself for as long as it was away."""
    ran = Simulation([Stream()] * 20).run(30)
    ran.streams.append(Stream())
    before, now = ran.seconds[20], ran.now
    ran.run(3)
    assert ran.seconds[20] - before <= 1.3 * (ran.now - now) / 21


def test_what_is_kept_of_streams_that_left_is_forgotten():
    ran = Simulation([Stream()] * 5).run(5)
    ran.streams = [Stream(), Stream()]
    ran.run(5)
    assert set(ran.shares.had) <= {0, 1}


units = st.lists(
    st.builds(
        Candidate,
        rows=st.integers(1, 3),
        remaining=st.integers(1, 50),
        age=st.integers(0, 500),
        priority=st.just(Priority.INTERACTIVE),
        lane=st.integers(0, 2),
        stream=st.one_of(st.none(), st.integers(0, 4)),
    ),
    min_size=1,
    max_size=30,
).filter(lambda all_of: any(unit.stream is not None for unit in all_of))


@given(units, st.floats(0, 1), st.integers(4, 40))
def test_a_tick_has_one_lane_and_its_bound_and_no_stream_overtakes_itself(
    waiting: list[Candidate], credit: float, most: int
):
    lanes = {lane: LaneCosts(most, cpu, LIVE_TICK_S) for lane in range(3)}
    turns = Turns()
    turns.wait({ANY_FLOW}, 0.0)
    chosen, shares = share_tick(
        waiting,
        Shares(credit),
        turns,
        lanes,
        lambda load: rows_of_tick(load, most, cpu, LIVE_TICK_S, tick=1),
    )
    assert chosen
    assert len(set(chosen)) == len(chosen)
    lane = waiting[chosen[0]].lane
    assert all(waiting[i].lane == lane for i in chosen)
    rows = sum(waiting[i].rows for i in chosen)
    live = any(waiting[i].stream is not None for i in chosen)
    assert rows <= most
    assert cpu(rows) <= (LIVE_TICK_S if live else max(LIVE_TICK_S, credit))
    assert shares.credit >= -1e-9
    for i in chosen:
        stream = waiting[i].stream
        if stream is not None:
            earlier = [j for j in range(i) if waiting[j].stream == stream]
            assert all(j in chosen for j in earlier if waiting[j].lane == lane)

"""Which forwards are recorded, when, and what happens to the recordings.

On a CPU, the recorder here runs the forward again on the memory to which it copied the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guidance.edits import IdentityAttention
from server.engine import graphs as graphs_module
from server.engine.cost_model import TickCost
from server.engine.graphs import BUSY_THRESHOLD, PIECE_FORWARDS, Graphs, worth_recording
from server.engine.preparation import Preparation
from server.engine.row_sizes import ROW_SIZES
from server.engine.task import Group
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.compiling.compiled_blocks import CompiledBlocks
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.placement import Placement
from tests.server.by_hand import task
from tests.server.engine.conftest import PATIENCE_S
from tests.server.toy_model import SIDE, Toy, run, started

SHAPE = (4, 4, 4)
SIZES = [size for size in ROW_SIZES if size <= 16]
DEAR = {1: 0.01, 128: 1.28}
"""Seconds of ticks by rows. Each row costs the same, so the fewest rows are best."""


class Clock:
    """A clock by which forwards take a set time, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "perf_counter", CLOCK)


class Waiting(Toy):
    """A toy whose forwards of few rows take a while unless they are replayed."""

    def __init__(self, few: int = 100, *, reads_values: bool = False) -> None:
        super().__init__()
        self.few = few
        self.reads_values = reads_values
        self.replayed = False
        self.slept = 0

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if not self.replayed:
            self.slept += 1
        CLOCK.now += 0.005 if not self.replayed or len(x) >= self.few else 0.001
        if self.reads_values:
            x = x * float(t.max() > -1)
        return super().evaluate(x, t, inputs)


class Recording:
    """A forward on memory of its own."""

    def __init__(
        self, model: Waiting, evaluate: Callable[..., Tensor], given: Sequence[Tensor], error: float
    ) -> None:
        self.calls = 0
        self.released = False
        self._model, self._evaluate, self._error = model, evaluate, error
        self._held = [one.clone() for one in given]

    def __call__(self, *given: Tensor) -> Tensor:
        assert not self.released
        self.calls += 1
        for mine, theirs in zip(self._held, given, strict=True):
            mine.copy_(theirs)
        self._model.replayed = True
        try:
            return self._evaluate(*self._held) + self._error
        finally:
            self._model.replayed = False

    def release(self) -> None:
        self.released = True


class Tape:
    """A recorder for the CPU."""

    bytes_each = 1000

    def __init__(self, model: Waiting, *, room: int = 100, error: float = 0.0) -> None:
        self.made: list[Recording] = []
        self.pools = 1
        self._model, self._room, self._error = model, room, error

    @property
    def nbytes(self) -> int:
        return self.bytes_each * sum(not one.released for one in self.made)

    def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
        return len(forward()) <= self._room and self.bytes_each <= room

    def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Recording:
        self.made.append(Recording(self._model, evaluate, given, self._error))
        return self.made[-1]

    def reset_pool(self) -> None:
        self.pools += 1


def forward(model: Toy, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, RowInputs]:
    prompts = [f"a star {seed + row}" for row in range(rows)]
    told = model.stack(model.encode_prompts(prompts, SIDE, SIDE))
    x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((rows,), 500.0 + seed), RowInputs(told)


def told_of(model: Toy, rows: int) -> Sequence[Tensor]:
    return list(forward(model, rows)[2].conditioning.tensors.values())


def evaluate(graphs: Graphs, given: tuple[Tensor, Tensor, RowInputs]) -> Tensor:
    return graphs.evaluate(*given, TickCost({1: 0.002}))


def recorded(model: Waiting, tape: Tape, rows: Sequence[int] = (2,)) -> Graphs:
    """Recordings after a forward of each number of rows, and an idle moment."""
    graphs = Graphs(model, tape)
    for count in rows:
        evaluate(graphs, forward(model, count))
    while graphs.wanted:
        graphs.record()
    return graphs


def test_a_forward_runs_as_ever_until_it_is_recorded_and_then_gives_the_same_bits() -> None:
    model = Waiting()
    tape, cost = Tape(model), TickCost({2: 0.005})
    graphs = Graphs(model, tape)
    first = graphs.evaluate(*forward(model, 2), cost)
    assert (graphs.wanted, tape.made) == (True, [])
    graphs.record()
    assert (graphs.wanted, graphs.rows) == (False, [2])
    assert 0 < cost.seconds(2) < 0.005
    calls = tape.made[0].calls
    assert torch.equal(evaluate(graphs, forward(model, 2)), first)
    other = forward(model, 2, seed=5)
    assert torch.equal(evaluate(graphs, other), Toy().evaluate(*other))
    assert tape.made[0].calls == calls + 2


def test_what_waits_for_its_recording_keeps_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Waiting()
    graphs = Graphs(model, Tape(model))
    three = sum(one.nbytes for one in (*forward(model, 3)[:2], *told_of(model, 3)))
    monkeypatch.setattr(graphs_module, "WANTED_BYTES", three)
    for rows in (1, 2, 3):
        evaluate(graphs, forward(model, rows))
    graphs.record()
    assert (graphs.rows, graphs.wanted) == ([3], False)


class NoCompiler:
    def ask(self, *_: Any, **__: Any) -> None: ...


def test_forwards_are_recorded_anew_once_blocks_of_the_model_are_compiled() -> None:
    model = Waiting()
    model.blocks = CompiledBlocks("toy", nn.Module(), (), model.device, NoCompiler())
    tape = Tape(model)
    graphs = recorded(model, tape)
    model.blocks.generation += 1
    evaluate(graphs, forward(model, 2))
    assert (graphs.rows, graphs.wanted, tape.pools) == ([], True, 2)
    assert tape.made[0].released
    graphs.record()
    assert graphs.rows == [2]
    assert not tape.made[1].released


def test_every_tensor_that_shapes_a_forward_makes_a_recording_of_its_own() -> None:
    model = Waiting()
    graphs = recorded(model, Tape(model))
    x, t, inputs = forward(model, 2)
    told = RowInputs(inputs.conditioning, scale_embedding=torch.ones(2))
    larger = torch.randn(2, 4, 8, 8)
    for given in ((x, t, told), (larger, t, inputs), forward(model, 3)):
        assert torch.equal(evaluate(graphs, given), Toy().evaluate(*given))
        assert graphs.wanted
        graphs.record()
        assert torch.equal(evaluate(graphs, given), Toy().evaluate(*given))
        assert not graphs.wanted


def test_forwards_of_a_model_that_does_not_take_them_apart_are_not_recorded() -> None:
    model = Waiting()
    tape = Tape(model)
    graphs = recorded(model, tape)
    calls = tape.made[0].calls
    x, t, inputs = forward(model, 2)
    ink = Weighted(Adapter("ink", "", {}), 1.0)
    for changed in (
        RowInputs(inputs.conditioning, [(IdentityAttention(("middle",)),), ()]),
        RowInputs(inputs.conditioning, adapters=RowAdapters(((ink,), ()))),
    ):
        evaluate(graphs, (x, t, changed))
        assert not graphs.wanted
    assert tape.made[0].calls == calls


def test_what_becomes_no_faster_is_not_kept_and_larger_forwards_are_not_tried() -> None:
    model = Waiting(few=4)
    tape = Tape(model)
    graphs = recorded(model, tape, rows=(1, 2, 4, 8))
    assert graphs.rows == [1, 2]
    assert [one.released for one in tape.made] == [False, False, True]
    evaluate(graphs, forward(model, 16))
    assert not graphs.wanted


def test_a_forward_that_waits_for_a_value_is_never_recorded(caplog) -> None:
    model = Waiting(reads_values=True)
    tape = Tape(model)
    graphs = recorded(model, tape, rows=(1, 2))
    assert (tape.made, graphs.wanted) == ([], False)
    evaluate(graphs, forward(model, 3))
    assert not graphs.wanted
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "run without CUDA graphs" in line
    assert "makes the host wait for a value" in line


def test_a_recording_with_other_numbers_than_the_forward_is_not_used(caplog) -> None:
    model = Waiting()
    tape = Tape(model, error=0.5)
    graphs = recorded(model, tape)
    assert (graphs.rows, graphs.wanted) == ([], False)
    assert tape.made[0].released
    assert "gives different results" in caplog.text


def test_rounding_alone_is_other_numbers_where_bits_are_promised(caplog) -> None:
    for exact, rows in ((False, [2]), (True, [])):
        model = Waiting()
        graphs = Graphs(model, Tape(model, error=1e-6), exact=exact)
        evaluate(graphs, forward(model, 2))
        while graphs.wanted:
            graphs.record()
        assert graphs.rows == rows
    assert "gives different results" in caplog.text


def test_an_image_that_became_nan_does_not_end_the_recordings_of_those_after_it() -> None:
    model = Waiting()
    graphs = Graphs(model, Tape(model))
    x, t, inputs = forward(model, 2)
    for given in (x.index_fill(0, torch.tensor([1]), torch.nan), x):
        graphs.evaluate(given, t, inputs, TickCost({1: 0.01}))
        assert graphs.wanted
        while graphs.wanted:
            graphs.record()
    assert graphs.rows == [2]


@pytest.mark.parametrize("failures", [1, 2])
def test_where_recording_fails_again_forwards_run_as_ever(failures, caplog, monkeypatch) -> None:
    """Another thread may have disturbed the first one."""
    model = Waiting()
    tape = Tape(model)
    record, left = tape.record, [failures]

    def fail(*given: Any) -> Recording:
        left[0] -= 1
        if left[0] < 0:
            return record(*given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tape, "record", fail)
    graphs = recorded(model, tape)
    assert (graphs.rows, graphs.wanted) == ([], False)
    for _ in range(2):
        own = forward(model, 2)
        assert torch.equal(evaluate(graphs, own), Toy().evaluate(*own))
        while graphs.wanted:
            graphs.record()
    assert graphs.rows == ([2] if failures == 1 else [])
    assert ("recording it failed" in caplog.text) == (failures == 2)


@pytest.mark.parametrize("short", ["no room", "out of memory"])
def test_while_memory_is_short_nothing_is_recorded(short, monkeypatch) -> None:
    model = Waiting()
    tape = Tape(model, room=2)
    graphs = recorded(model, tape, rows=(2,))
    evaluate(graphs, forward(model, 3))
    if short == "out of memory":
        graphs.release()
        assert tape.made[0].released
        assert (graphs.rows, tape.pools) == ([], 2)
    else:
        graphs.record()
        assert graphs.rows == [2]
    evaluate(graphs, forward(model, 3))
    assert not graphs.wanted
    later = graphs_module.monotonic() + graphs_module.PAUSE_AFTER_SHORTAGE_S
    monkeypatch.setattr(graphs_module, "monotonic", lambda: later + 1)
    evaluate(graphs, forward(model, 3))
    assert graphs.wanted


@pytest.mark.parametrize(
    ("runs", "forward_s", "max_s", "pays"),
    [
        (BUSY_THRESHOLD - 1, 0.01, 1.0, False),
        (BUSY_THRESHOLD, 0.01, 1.0, True),
        (BUSY_THRESHOLD, 0.03, 0.1, True),
        (100 * BUSY_THRESHOLD, 0.04, 0.1, False),
    ],
)
def test_a_forward_is_recorded_between_ticks_once_it_has_run_often_and_if_pieces_are_short(
    runs: int, forward_s: float, max_s: float, pays: bool
) -> None:
    assert worth_recording(runs, forward_s, max_s) == pays


def often_run(model: Waiting, tape: Tape) -> Graphs:
    """Recordings after many forwards of 2 rows, and not quite as many of 1."""
    graphs = Graphs(model, tape)
    for rows in [1, 2] * (BUSY_THRESHOLD - 1):
        evaluate(graphs, forward(model, rows))
    assert not graphs.due(1.0)
    evaluate(graphs, forward(model, 2))
    return graphs


def test_a_forward_that_runs_often_is_recorded_in_pieces_between_others() -> None:
    model = Waiting()
    tape = Tape(model)
    graphs = often_run(model, tape)
    while graphs.due(1.0):
        slept, calls = model.slept, sum(one.calls for one in tape.made)
        graphs.record_piece(1.0)
        replays = sum(one.calls for one in tape.made) - calls
        assert model.slept - slept + replays <= PIECE_FORWARDS
        given = forward(model, 2, seed=9)
        assert torch.equal(evaluate(graphs, given), Toy().evaluate(*given))
    assert graphs.rows == [2]
    assert len(tape.made) == 1
    while graphs.wanted:
        graphs.record()
    assert graphs.rows == [1, 2]
    assert len(tape.made) == 2


def test_a_forward_is_recorded_before_others_can_evict_what_it_has_cached() -> None:
    """A capture could not copy it from the host again."""
    order = list[str]()

    class Noting(Tape):
        def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
            order.append("run")
            return super().fits(forward, room)

        def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Recording:
            order.append("recorded")
            return super().record(evaluate, given)

    model = Waiting()
    graphs = often_run(model, Noting(model))
    while graphs.due(1.0):
        graphs.record_piece(1.0)
        order.append("ticks")
    assert order[order.index("run") + 1] == "recorded"


def test_weights_and_recordings_take_no_more_than_is_allowed_together() -> None:
    class Weighty(Waiting):
        def modules(self) -> dict[str, nn.Module]:
            return {"unet": nn.Linear(250, 1, bias=False)}

    model = Weighty()
    recorders = iter([Tape(model) for _ in range(3)])
    preparation = Preparation(lambda _: next(recorders), max_bytes=1000 + 1999)
    forwards = preparation.add(model, SHAPE, TickCost({1: 0.002}), 16)
    for rows in (1, 2):
        forwards.evaluate(*forward(model, rows), max_rows=16)
    while piece := preparation.next():
        piece()
    assert preparation.of("toy", SHAPE).recorded == (1,)
    assert preparation.recorded_bytes == 1000
    preparation.forget("toy")
    assert preparation.recorded_bytes == 0


def test_a_recording_under_way_is_let_go_of_when_memory_is_short() -> None:
    model = Waiting()
    tape = Tape(model)
    graphs = often_run(model, tape)
    while not tape.made:
        graphs.record_piece(1.0)
    assert graphs.release()
    assert tape.made[0].released
    assert not graphs.release()
    assert (graphs.rows, graphs.wanted, graphs.due(1.0)) == ([], False, False)


def test_an_engine_that_is_never_idle_records_its_ticks(monkeypatch) -> None:
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 1000.0)
    monkeypatch.setattr("server.engine.idle_work.PIECE_REST", 0)
    model = Waiting()
    tape = Tape(model)
    preparation = Preparation(lambda _: tape)
    monkeypatch.setattr("server.engine.idle_work.Preparation", lambda *_, **__: preparation)
    engine = started(model, 16, prepares=True)
    assert tape.made == []
    run(engine, [task(steps=3 * BUSY_THRESHOLD)])
    assert engine.release_recordings()
    assert tape.made[0].released
    assert not engine.release_recordings()
    engine.stop(0)
    assert len(tape.made) == 1
    assert tape.made[0].calls > BUSY_THRESHOLD


@pytest.mark.parametrize(
    "short_in", [("encode_prompts", "encode_image"), ("evaluate",), ("decode",)]
)
def test_no_image_fails_before_recordings_have_given_their_memory_back(
    short_in: tuple[str, ...], monkeypatch
) -> None:
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 1000.0)
    monkeypatch.setattr("server.engine.idle_work.PIECE_REST", 0)
    model = Waiting()
    tape = Tape(model)
    preparation = Preparation(lambda _: tape)
    monkeypatch.setattr("server.engine.idle_work.Preparation", lambda *_, **__: preparation)
    engine = started(model, 16, prepares=True)
    run(engine, [task(steps=3 * BUSY_THRESHOLD)])

    def short(encode: Any) -> Any:
        def encoded(*given: Any) -> Any:
            if not tape.made[0].released:
                raise torch.OutOfMemoryError("no room")
            return encode(*given)

        return encoded

    for name in short_in:
        monkeypatch.setattr(model, name, short(getattr(model, name)))
    image = torch.zeros(3, SIDE, SIDE)
    ear = run(engine, [task(prompt="unheard of", image=image, steps=2)])
    engine.stop(0)
    assert not ear.errors
    assert tape.made[0].released


def test_an_engine_replays_its_small_ticks_and_draws_the_same_images(monkeypatch) -> None:
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 0.01)
    tasks = [task(seed=seed, steps=3 + seed) for seed in range(5)]
    plain = started(Toy(), 16)
    expected = run(plain, tasks).results
    plain.stop(0)
    model = Waiting()
    tape = Tape(model)
    preparation = Preparation(lambda _: tape)
    monkeypatch.setattr("server.engine.idle_work.Preparation", lambda *_, **__: preparation)
    engine = started(model, 16, prepares=True)
    until = monotonic() + PATIENCE_S
    while engine.prepared(model) != (tuple(SIZES), tuple(SIZES)):
        assert monotonic() < until
        sleep(0.01)
    before = model.slept
    results = run(engine, tasks).results
    for i in range(len(tasks)):
        assert np.array_equal(results[i].pixels, expected[i].pixels)
    assert model.slept == before
    assert engine.remove_model("toy")
    assert all(one.released for one in tape.made)
    engine.stop(0)


def test_a_deterministic_engine_replays_its_ticks_of_fixed_rows_and_draws_the_same_bits(
    monkeypatch,
) -> None:
    """The group needs ten rows at once, and so forwards of sixteen."""
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 0.01)
    group = Group()
    tasks = [
        *(task(seed=seed, steps=3 + seed) for seed in range(3)),
        *(task(seed=seed, group=group) for seed in range(5)),
    ]
    plain = started(Toy(), None, deterministic=True, guessed_costs=DEAR)
    expected = run(plain, tasks).results
    plain.stop(0)
    model = Waiting()
    tape = Tape(model)
    monkeypatch.setattr(
        "server.engine.idle_work.Preparation",
        lambda _, max_bytes, *, fixed: Preparation(lambda _: tape, max_bytes, fixed=fixed),
    )
    engine = started(model, None, prepares=True, deterministic=True, guessed_costs=DEAR)
    run(engine, tasks)
    until = monotonic() + PATIENCE_S
    while engine.prepared(model) != ((8, 16), (8, 16)):
        assert monotonic() < until, engine.prepared(model)
        sleep(0.01)
    before = model.slept
    results = run(engine, tasks).results
    engine.stop(0)
    assert model.slept == before
    for i in range(len(tasks)):
        assert np.array_equal(results[i].pixels, expected[i].pixels)


def test_forwards_of_a_network_whose_blocks_come_and_go_are_not_recorded() -> None:
    asked: list[str] = []

    def recorder_of(model: HostedModel) -> Tape:
        asked.append(model.facts.name)
        return Tape(Waiting())

    preparation = Preparation(recorder_of)
    for placement in (Placement(offload="text"), Placement(offload="all")):
        model = Toy(name=placement.offload)
        model.placement = placement
        preparation.add(model, SHAPE, TickCost({1: 0.01}), 8)
    assert set(asked) == {"text"}

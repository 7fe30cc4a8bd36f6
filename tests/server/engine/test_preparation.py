"""Sizes of forwards run before they are needed: some at the start, others while nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Event
from time import monotonic

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance import CFG, PAG, SEG, SLG
from guidance.edits import IdentityAttention
from server.engine import idle_work
from server.engine.cost_model import TickCost
from server.engine.engine import Engine
from server.engine.forwards import Forwards
from server.engine.metrics import EngineMeasurements
from server.engine.preparation import AT_START, MAX_CACHED_SHAPES, Preparation
from server.engine.row_sizes import ROW_SIZES
from server.engine.scheduler import Load
from server.engine.selection import Selection
from server.engine.state.lane import Lane
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.conditioning import Conditioning
from server.models.inputs import RowInputs
from tests.server.by_hand import task
from tests.server.engine.conftest import PATIENCE_S
from tests.server.toy_model import FACTS, SIDE, Toy, run, started

SHAPE = (4, 4, 4)
MAX_ROWS = 40


class Busy(Toy):
    """A toy with room for some rows, which counts the rows tried and the pictures it gets."""

    def __init__(self, room: int = MAX_ROWS, **facts: object) -> None:
        super().__init__(**facts)
        self.room = room
        self.tried: list[int] = []
        self.pictures: list[int] = []

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().evaluate(x, t, inputs)

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.pictures.append(len(pixels))
        return super().encode_image(pixels)


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Starts engines that take every idle moment as quiet, and stops them in the end."""
    monkeypatch.setattr(idle_work, "QUIET_S", 0.01)
    engines: list[Engine] = []

    def make(model: Toy, **options: bool) -> Engine:
        engines.append(started(model, MAX_ROWS, prepares=True, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop(0)


def sizes_of(model: Toy) -> set[int]:
    return {len(x) for x in model.seen}


def wait_for(model: Busy, size: int) -> None:
    until = monotonic() + PATIENCE_S
    while size not in model.tried:
        assert monotonic() < until, sorted(set(model.tried))
        Event().wait(0.005)


def wait_until_settled(engine: Engine) -> None:
    until = monotonic() + PATIENCE_S
    while not engine.settled:
        assert monotonic() < until
        Event().wait(0.005)


def test_small_sizes_have_run_when_the_server_is_ready_and_all_of_them_soon_after(begin):
    model = Busy()
    begin(model)
    assert {size for size in ROW_SIZES if size <= AT_START} <= sizes_of(model)
    assert model.pictures[-8:] == [1, 1, 2, 2, 3, 3, 4, 4]
    wait_for(model, MAX_ROWS)
    assert sorted(set(model.tried)) == [size for size in ROW_SIZES if size <= MAX_ROWS]


def test_an_engine_is_settled_when_nothing_is_left_to_prepare_and_nothing_waits(begin):
    class Asking(Busy):
        """Asks in each forward whether the engine is settled."""

        engine: Engine | None = None
        heard: tuple[bool, ...] = ()

        def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
            if self.engine is not None:
                self.heard = (*self.heard, self.engine.settled)
            return super().evaluate(x, t, inputs)

    model = Asking()
    engine = begin(model)
    wait_until_settled(engine)
    assert set(model.tried) == {size for size in ROW_SIZES if size <= MAX_ROWS}
    model.engine = engine
    run(engine, [task()])
    assert set(model.heard) == {False}
    wait_until_settled(engine)


def test_images_are_the_same_and_no_tick_is_the_first_of_its_size(begin):
    tasks = [task(seed=seed, steps=3 + seed) for seed in range(9)]
    plain = started(Toy(), MAX_ROWS)
    expected = run(plain, tasks).results
    plain.stop(0)
    model = Busy()
    engine = begin(model)
    wait_for(model, MAX_ROWS)
    before = len(model.seen)
    results = run(engine, tasks).results
    for i in range(len(tasks)):
        assert np.array_equal(results[i].pixels, expected[i].pixels)
    assert {len(x) for x in model.seen[before:]} <= set(ROW_SIZES)


def test_rows_that_fill_up_make_no_edits_and_have_the_adapters_of_the_last_row():
    class Inside(Toy):
        """Records what is changed inside it."""

        def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
            self.given = inputs
            return super().evaluate(x, t, inputs)

    model = Inside()
    forwards = Forwards(model, SHAPE, TickCost({1: 0.01}), 16)
    ink = Weighted(Adapter("ink", "", {}), 1.0)
    edits = [(IdentityAttention(("middle",)),)] * 5
    told = model.stack(model.encode_prompts(["a star"] * 5, SIDE, SIDE))
    inputs = RowInputs(told, edits, adapters=RowAdapters(((ink,),) * 5))
    x, t = torch.randn(5, *SHAPE), torch.full((5,), 500.0)
    raw = forwards.evaluate(x, t, inputs, max_rows=16)
    assert len(model.seen[-1]) == 6
    assert model.given.edits == [*edits, ()]
    assert model.given.adapters == RowAdapters(((ink,),) * 6)
    assert torch.equal(raw, Toy().evaluate(x, t, inputs))


def test_a_forward_of_several_sizes_makes_none_of_its_largest_size_known():
    """Its masks need other kernels, so a plain forward of that size would still be a first one."""

    class Mixing(Toy):
        def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
            return list(x)

    model = Mixing()
    forwards = Forwards(model, SHAPE, TickCost({1: 0.01}), 16)
    told = model.stack(model.encode_prompts(["a star"] * 5, SIDE, SIDE))
    x = [torch.randn(2, 4, 2, 2), torch.randn(3, *SHAPE)]
    raw = forwards.evaluate_sizes(x, torch.zeros(5), RowInputs(told), max_rows=16)
    assert [len(part) for part in raw] == [2, 3]
    assert forwards.sizes.known == ()
    assert forwards.known == 1
    forwards.sizes.note(12, 12, lambda _: 0.01)
    assert forwards.size_of(5, 16, mixed=True) == 6
    assert forwards.size_of(5, 16) == 12


def test_what_has_no_room_is_tried_once_and_the_server_goes_on(begin):
    model = Busy(room=20)
    engine = begin(model)
    wait_for(model, 24)
    run(engine, [task(seed=seed) for seed in range(12)])
    Event().wait(0.1)
    assert model.tried.count(24) <= 2
    assert max(model.tried) == 24
    assert engine.failure is None


def test_no_image_fails_for_rows_that_only_fill_up(begin):
    model = Busy()
    engine = begin(model)
    wait_until_settled(engine)
    # Since then others have taken the memory.
    model.room = 5
    before = len(model.tried)
    beside = PAG(layers=("middle",)), SEG(layers=("middle",)), SLG(start=0, stop=1)
    assert not run(engine, [task(CFG(), settings=beside)]).errors
    assert model.tried[before:] == [6, *[5] * 6]


def test_where_a_rehearsal_cannot_even_begin_its_size_is_given_up():
    class Speechless(Busy):
        """A toy without room for its text encoder's forward."""

        def encode_prompts(self, *_: object, **__: object) -> list[Conditioning]:
            raise torch.OutOfMemoryError("no room")

    preparation, failed = Preparation(), 0
    shape = preparation.forwards(Speechless(), SHAPE, TickCost({1: 0.01}), MAX_ROWS)
    while piece := preparation.next():
        with pytest.raises(torch.OutOfMemoryError):
            piece()
        failed += 1
        assert failed <= len(ROW_SIZES), "the engine would try for ever"
    assert not shape.sizes.known


def test_deterministic_engines_keep_to_their_one_size(begin):
    model = Busy()
    engine = begin(model, deterministic=True)
    run(engine, [task()])
    assert sizes_of(model) == {MAX_ROWS}


def test_no_other_rows_are_prepared_than_a_deterministic_engines_forwards_have(monkeypatch):
    """With a budget of 20 rows they have 24, whatever the size of the images."""
    monkeypatch.setattr(idle_work, "QUIET_S", 0.01)
    model = Toy()
    engine = started(model, 20, prepares=True, deterministic=True, guessed_costs={1: 0.01})
    model.seen.clear()
    run(engine, [replace(task(steps=2), width=64, height=64)])
    wait_until_settled(engine)
    engine.stop(0)
    assert sizes_of(model) == {24}


def test_rows_of_a_fixed_forward_are_changed_by_products_of_all_rows(monkeypatch):
    """Otherwise the bits of a row would depend on which others have adapters."""
    model, given = Toy(), list[RowInputs]()

    def evaluate(x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        given.append(inputs)
        return x

    monkeypatch.setattr(model, "evaluate", evaluate)
    own = (Weighted(Adapter("one", "0", {}), 1.0),)
    texts = model.stack(model.encode_prompts([None] * 8, 32, 32))
    inputs = RowInputs(texts, adapters=RowAdapters((own, *((),) * 7), fixed=True))
    forwards = Forwards(model, SHAPE, TickCost({1: 0.01}), 8, fixed=True)
    forwards.evaluate(torch.zeros(8, *SHAPE), torch.zeros(8), inputs, max_rows=8)
    assert [one.adapters for one in given] == [inputs.adapters]


def test_a_tick_is_planned_by_the_size_that_it_is_filled_up_to():
    """18 rows would run as 20, so two ticks of 9 are faster."""
    selection = Selection(EngineMeasurements(row_budget=MAX_ROWS), live_tick_s=0.1)
    cost = TickCost({1: 0.02, 128: 1.29})
    forwards = Forwards(Toy(), SHAPE, cost, MAX_ROWS)
    for size in (1, 9, 20):
        forwards.sizes.note(size, size, cost.seconds)
    lane = Lane(Toy(), SHAPE, cost, MAX_ROWS, forwards)
    assert selection.rows_of_tick(Load(lane=0, rows=18, widest=1, live=False), lane) == 9


def test_other_latent_shapes_are_prepared_smallest_forwards_first_as_long_as_they_are_short():
    model, preparation = Busy(), Preparation()
    default = preparation.add(model, SHAPE, TickCost({1: 0.01}), MAX_ROWS)
    for size in ROW_SIZES:
        default.sizes.note(size, size, lambda _: 0.01)
    large = preparation.forwards(model, (4, 8, 8), TickCost({1: 0.3}), MAX_ROWS)
    while piece := preparation.next():
        piece()
    assert large.sizes.known == (1, 2, 3)
    assert {x.shape[1:] for x in model.seen} == {(4, 8, 8)}


def test_shapes_of_ever_new_requests_leave_nothing_behind_but_the_default_one_stays():
    model, preparation = Busy(), Preparation()
    default = preparation.add(model, SHAPE, TickCost({1: 0.01}), MAX_ROWS)
    made = [
        preparation.forwards(model, (4, side, 8), TickCost({1: 0.01}), MAX_ROWS)
        for side in range(8, 12 + MAX_CACHED_SHAPES)
    ]
    assert preparation.forwards(model, SHAPE, TickCost({1: 0.01}), MAX_ROWS) is default
    last = (4, 11 + MAX_CACHED_SHAPES, 8)
    assert preparation.forwards(model, last, TickCost({1: 1}), 4) is made[-1]
    assert preparation.forwards(model, (4, 8, 8), TickCost({1: 0.01}), MAX_ROWS) is not made[0]
    preparation.forget(FACTS.name)
    assert preparation.next() is None

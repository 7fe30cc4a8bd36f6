"""Images of several sizes in one forward of the engine, with a model that can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance import EasyCache, NegToMe
from guidance.apg import APG
from guidance.cfg import CFG
from guidance.pag import PAG
from guidance.unguided import Unguided
from samplers.ddim import DDIM
from samplers.unipc import UniPC
from server.engine.client import Client, Flow
from server.engine.cost_model import TICKS_TO_UNLEARN_GUESS, TickCost
from server.engine.engine import Engine
from server.engine.fair_queue import Turns
from server.engine.task import Group
from server.engine.tick.stage import Stage, run_stage
from server.errors import RowFailed
from server.models.inputs import RowInputs
from tests.server.by_hand import Asked, task
from tests.server.toy_model import Ear, Neighbourly, run, started

SIZES = {"small": (32, 32), "wide": (48, 32), "large": (64, 64)}
STEPS = 6
OBSERVE, OBSERVE_MIXED, SHIFT = TickCost.observe, TickCost.observe_mixed, TickCost.shift
IS_GUESS = TickCost.is_guess


class Mixing(Neighbourly):
    """A toy that mixes sizes, and records how many rows of each size its forwards had.

    Args:
        mixes: whether it declares that it mixes sizes.

    Attributes:
        forwards: for each forward, its rows by width and height of their latents.
        max_rows: the most rows that fit in its memory at once.
    """

    def __init__(self, *, mixes: bool = True) -> None:
        super().__init__()
        self.forwards: list[dict[tuple[int, int], int]] = []
        self.max_rows = 1000
        self._mixes = mixes

    @property
    def mixes_sizes(self) -> bool:
        return self._mixes

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self._count([x])
        return super().evaluate(x, t, inputs)

    def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        self._count(x)
        rows = torch.arange(len(t)).split([len(part) for part in x])
        return [
            super(Mixing, self).evaluate(part, t[own], inputs.of(own.tolist()))
            for part, own in zip(x, rows, strict=True)
        ]

    def _count(self, x: Sequence[Tensor]) -> None:
        self.forwards.append({(part.shape[-1], part.shape[-2]): len(part) for part in x})
        if sum(map(len, x)) > self.max_rows:
            raise torch.OutOfMemoryError("no room")


@pytest.fixture(scope="module")
def model() -> Mixing:
    return Mixing()


@pytest.fixture(scope="module")
def shared(model: Mixing) -> Iterator[Engine]:
    made = started(model, 24)
    yield made
    made.stop(0)


@pytest.fixture(autouse=True)
def _steady_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep times measured on a busy machine from deciding which images share ticks."""
    for observe in ("observe", "observe_mixed"):
        monkeypatch.setattr(f"server.engine.cost_model.TickCost.{observe}", lambda *_: 1.0)
    monkeypatch.setattr("server.engine.cost_model.TickCost.shift", lambda *_: None)
    monkeypatch.setattr("server.engine.cost_model.TickCost.is_guess", False)


@pytest.fixture
def engine(model: Mixing, shared: Engine) -> Engine:
    model.forwards.clear()
    return shared


def of(size: str, *given: Any, **fields: Any) -> Asked:
    width, height = SIZES[size]
    return replace(task(*given, **{"steps": STEPS, **fields}), width=width, height=height)


def pair(size: str, strength: float) -> list[Asked]:
    """Two images that keep apart from each other."""
    group = Group()
    apart = NegToMe(strength=strength, layers=("middle",), stop=1.0)
    return [
        replace(of(size, settings=(apart,), sampler=DDIM(eta=1), seed=40 + k), group=group)
        for k in range(2)
    ]


def various() -> list[Asked]:
    return [
        of("small", CFG(scale=3.0)),
        of("large", APG(scale=4.0), sampler=UniPC(), seed=4),
        *pair("wide", 2.0),
        of("wide", Unguided(), settings=(PAG(layers=("middle",)),), seed=5),
        *pair("small", 1.0),
    ]


def pixels(ear: Ear) -> list[NDArray[np.uint8]]:
    assert not ear.errors, ear.errors
    return [ear.results[i].pixels for i in range(len(ear.results))]


def apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


def test_an_image_is_the_same_alone_and_among_other_sizes(model: Mixing, engine: Engine) -> None:
    tasks = various()
    mixed = pixels(run(engine, tasks))
    assert [len(forward) for forward in model.forwards] == [len(SIZES)] * STEPS
    units = tasks[:1], tasks[1:2], tasks[2:4], tasks[4:5], tasks[5:]
    alone = [one for unit in units for one in pixels(run(engine, unit))]
    for ours, own in zip(mixed, alone, strict=True):
        assert apart(ours, own) <= 1
    assert apart(mixed[2], mixed[3]) > 1


def test_images_of_several_sizes_recall_the_same_stages_as_alone(engine: Engine) -> None:
    cache = EasyCache(threshold=0.5, start=0.1)
    tasks = [of(size, CFG(), cache=cache, steps=14) for size in SIZES]
    mixed = run(engine, tasks)
    for index, one in enumerate(tasks):
        ours, [alone] = mixed.results[index], run(engine, [one]).results.values()
        assert apart(ours.pixels, alone.pixels) <= 1
        assert (ours.evaluations, ours.saved) == (alone.evaluations, alone.saved)
        assert ours.saved > 0


@pytest.mark.parametrize("mixes", [True, False])
def test_sizes_at_once_take_the_forwards_of_one_where_the_model_mixes_them(mixes: bool) -> None:
    model = Mixing(mixes=mixes)
    engine = started(model, 24)
    model.forwards.clear()
    pixels(run(engine, [of(size, CFG()) for size in SIZES]))
    engine.stop(0)
    assert len(model.forwards) == STEPS * (1 if mixes else len(SIZES))
    assert sum(sum(forward.values()) for forward in model.forwards) == 2 * STEPS * len(SIZES)


def test_mixed_forwards_are_filled_up_as_others_are_where_few_sizes_are_known(
    model: Mixing, engine: Engine
) -> None:
    tasks = [of("small", Unguided()), *(of(size, CFG(), seed=4) for size in SIZES)]
    expected = pixels(run(engine, tasks))
    filled = Mixing()
    engine = started(filled, 24, prepares=True)
    filled.forwards.clear()
    ours = pixels(run(engine, tasks))
    engine.stop(0)
    mixed = [forward for forward in filled.forwards if len(forward) > 1]
    assert [sum(forward.values()) for forward in mixed] == [8] * STEPS
    assert max(apart(a, b) for a, b in zip(expected, ours, strict=True)) <= 1


def test_where_bits_must_not_depend_on_company_sizes_stay_apart() -> None:
    model = Mixing()
    engine = started(model, 8, deterministic=True)
    model.forwards.clear()
    pixels(run(engine, [of(size, Unguided()) for size in SIZES]))
    engine.stop(0)
    assert {len(forward) for forward in model.forwards} == {1}


def test_running_out_of_memory_divides_a_mixed_tick_and_caps_its_largest_size_alone(
    model: Mixing, engine: Engine
) -> None:
    tasks = various()
    expected = pixels(run(engine, tasks))
    engine = started(model, 24)
    model.forwards.clear()
    model.max_rows = 6
    survived = pixels(run(engine, tasks))
    smalls = pixels(run(engine, [of("small", Unguided(), seed=seed) for seed in range(6)]))
    model.max_rows = 1000
    engine.stop(0)
    assert max(apart(a, b) for a, b in zip(expected, survived, strict=True)) <= 1
    failed = [forward for forward in model.forwards if sum(forward.values()) > 6]
    assert len(failed) <= 2, "what did not fit is not tried again"
    assert any(len(forward) > 1 and sum(forward.values()) <= 6 for forward in model.forwards)
    assert len(smalls) == max(forward.get((4, 4), 0) for forward in model.forwards[-STEPS:])


def test_an_image_that_breaks_ends_alone_among_other_sizes(engine: Engine) -> None:
    broken = of("wide", CFG(), image=torch.full((3, 32, 48), torch.nan))
    ear = run(engine, [of("small", CFG()), broken, of("large", CFG())])
    assert list(ear.errors) == [1]
    assert isinstance(ear.errors[1], RowFailed)
    assert sorted(ear.results) == [0, 2]


def test_previews_are_of_each_image_s_own_size(engine: Engine) -> None:
    class Watching(Ear):
        shapes: dict[int, set[Any]]

        def progress(self, index: int, step: int, steps: int, preview: Any) -> None:
            if preview is not None:
                self.shapes.setdefault(index, set()).add(preview.shape)

    ear = Watching(len(SIZES))
    ear.shapes = {}
    engine.submit([of(size, CFG(), previews=True) for size in SIZES], ear)
    pixels(ear.wait())
    shapes = [{(height // 2, width // 2, 3)} for width, height in SIZES.values()]
    assert ear.shapes == dict(enumerate(shapes))


def test_each_client_pays_for_a_mixed_tick_by_the_area_of_its_rows(
    model: Mixing, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    charges: list[tuple[Client, float]] = []
    charge = Turns.charge

    def noted(turns: Turns, flow: Flow, seconds: float) -> None:
        charges.append((flow.client, seconds))
        charge(turns, flow, seconds)

    class First(Ear):
        def started(self, index: int) -> None:
            engine.submit([of("large", Unguided(), seed=1)], second, large)

    monkeypatch.setattr(Turns, "charge", noted)
    small, large = Client("small"), Client("large")
    first, second = First(1), Ear(1)
    engine.submit([of("small", Unguided(), seed=1)], first, small)
    for ear in (first, second):
        pixels(ear.wait())
    by_tick = [dict(both) for both in pairwise(charges) if len(dict(both)) == 2]
    mixed = [tick for tick in by_tick if tick[large] == pytest.approx(4 * tick[small])]
    assert len(mixed) >= STEPS - 1


def test_a_mixed_tick_teaches_what_mixing_costs_its_largest_size_and_tells_others_of_the_machine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: dict[TickCost, list[tuple[int, float]]] = {}
    told: dict[TickCost, list[float]] = {}

    def observe(cost: TickCost, rows: int, seconds: float) -> float:
        taught.setdefault(cost, []).append((rows, seconds))
        return 1.25

    def shift(cost: TickCost, factor: float) -> None:
        told.setdefault(cost, []).append(factor)

    monkeypatch.setattr(TickCost, "observe_mixed", observe)
    monkeypatch.setattr(TickCost, "shift", shift)
    pixels(run(engine, [of(size, CFG()) for size in SIZES]))
    [ticks] = taught.values()
    assert [rows for rows, _ in ticks] == [2 * len(SIZES)] * STEPS
    assert list(told.values()) == [[1.25] * STEPS] * (len(SIZES) - 1)


def test_a_size_shares_ticks_once_a_few_of_its_own_have_shown_what_it_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TickCost, "observe", OBSERVE)
    monkeypatch.setattr(TickCost, "is_guess", IS_GUESS)
    monkeypatch.setattr(
        "server.engine.stages.run_stage",
        lambda *given: replace(run_stage(*given), seconds=0.02),
    )
    model = Mixing()
    engine = started(model, 24, guessed_costs={1: 0.02, 128: 0.02})
    model.forwards.clear()
    pixels(run(engine, [of(size, CFG(), steps=20) for size in SIZES]))
    engine.stop(0)
    first = next(n for n, forward in enumerate(model.forwards) if len(forward) == len(SIZES))
    before = [size for forward in model.forwards[:first] if len(forward) == 1 for size in forward]
    # That of the third size was measured at the start.
    assert before.count((6, 4)) >= TICKS_TO_UNLEARN_GUESS
    assert before.count((8, 8)) >= TICKS_TO_UNLEARN_GUESS


def test_sizes_no_longer_share_ticks_once_these_have_shown_that_it_saves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(*given: Any) -> Stage:
        """Takes 0.02 s, or three times as long where sizes are mixed."""
        stage = run_stage(*given)
        return replace(stage, seconds=0.02 if len(stage.outcomes) == 1 else 0.06)

    monkeypatch.setattr(TickCost, "observe", OBSERVE)
    monkeypatch.setattr(TickCost, "observe_mixed", OBSERVE_MIXED)
    monkeypatch.setattr(TickCost, "shift", SHIFT)
    monkeypatch.setattr("server.engine.stages.run_stage", timed)
    model = Mixing()
    engine = started(model, 24, guessed_costs={1: 0.02, 128: 0.02})
    sizes = [of("small", CFG(), steps=20), of("large", CFG(), steps=20)]
    for one in sizes:
        # No guesses are left.
        pixels(run(engine, [one]))
    pixels(run(engine, sizes))
    assert {(4, 4), (8, 8)} in [forward.keys() for forward in model.forwards]
    model.forwards.clear()
    pixels(run(engine, sizes))
    engine.stop(0)
    mixed = [forward for forward in model.forwards if len(forward) > 1]
    assert len(mixed) <= 1


def test_what_mixed_ticks_take_longer_does_not_add_up_in_the_cost_of_the_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(*given: Any) -> Stage:
        """Takes 0.02 s, or 0.03 s where sizes are mixed."""
        stage = run_stage(*given)
        return replace(stage, seconds=0.01 * (1 + min(2, len(stage.outcomes))))

    monkeypatch.setattr(TickCost, "observe", OBSERVE)
    monkeypatch.setattr(TickCost, "observe_mixed", OBSERVE_MIXED)
    monkeypatch.setattr(TickCost, "shift", SHIFT)
    monkeypatch.setattr("server.engine.stages.run_stage", timed)
    model = Mixing()
    engine = started(model, 24, guessed_costs={1: 0.02, 128: 0.02})
    sizes = [of("small", CFG()), of("large", CFG())]
    for one in (*sizes, *sizes):
        # No guesses are left.
        pixels(run(engine, [one]))
    small = engine.tick_costs()[0][2]
    before = small.seconds(2)
    for _ in range(12):
        pixels(run(engine, sizes))
        pixels(run(engine, sizes[1:]))
    engine.stop(0)
    assert {(4, 4), (8, 8)} in [forward.keys() for forward in model.forwards]
    assert small.seconds(2) == pytest.approx(before, rel=0.5)

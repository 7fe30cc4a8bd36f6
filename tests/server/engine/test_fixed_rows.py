"""How many rows a forward has where images must be bit-identical beside any others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from threading import Event
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance.cfg import CFG
from guidance.composed import Composed, WeightedPrompt
from server.engine.client import Client
from server.engine.engine import Engine
from server.engine.task import Group
from server.errors import InvalidRequest
from tests.server import by_hand
from tests.server.full_ticks import full_ticks
from tests.server.toy_model import Ear, Toy, run, started


class Crowded(Toy):
    """Its rows depend on their number, as those of networks do through the choice of kernels."""

    def evaluate(self, x: Tensor, t: Tensor, inputs: Any) -> Tensor:
        return super().evaluate(x, t, inputs) + 0.01 * len(x)


def rows_of(model: Toy) -> set[int]:
    return {len(x) for x in model.seen}


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        pytest.param({1: 0.01, 128: 1.28}, 8, id="each row costs as much"),
        pytest.param({1: 0.01, 16: 0.012, 128: 0.096}, 16, id="few cost little more than one"),
        pytest.param({1: 0.01, 128: 0.01}, 104, id="rows cost nothing"),
    ],
)
def test_forwards_have_the_fewest_rows_with_most_of_the_best_throughput(
    seconds: Mapping[int, float], rows: int
) -> None:
    model = Toy()
    engine = started(model, None, deterministic=True, guessed_costs=seconds)
    model.seen.clear()
    run(engine, [by_hand.task(rule=CFG(), steps=2)])
    run(engine, [by_hand.task(rule=CFG(), steps=2, seed=seed) for seed in range(60)])
    engine.stop(0)
    assert rows_of(model) == {rows}


def test_images_that_need_more_rows_at_once_have_larger_forwards_and_keep_their_bits() -> None:
    """One image needs them for its nine prompts, six for their group."""
    prompts = tuple(WeightedPrompt(prompt=f"{number} stars") for number in range(8))
    group = Group()
    tasks = [
        *(by_hand.task(rule=CFG(), steps=3, seed=seed) for seed in range(3)),
        by_hand.task(rule=Composed(prompts=prompts), steps=3, seed=3),
        *(replace(by_hand.task(rule=CFG(), steps=3, seed=seed), group=group) for seed in range(6)),
    ]
    model = Crowded()
    engine = started(model, None, deterministic=True, guessed_costs={1: 0.01, 128: 1.28})
    model.seen.clear()
    together = run(engine, tasks).results
    assert rows_of(model) == {8, 16}
    parts = [[0], [1], [2], [3], [4, 5, 6, 7, 8, 9]]
    for part in parts:
        alone = run(engine, [tasks[number] for number in part]).results
        for place, number in enumerate(part):
            assert np.array_equal(alone[place].pixels, together[number].pixels)
    engine.stop(0)


def test_a_forward_never_has_more_rows_than_the_budget() -> None:
    """Twice the fixed rows would be more."""
    group = Group()
    tasks = [replace(by_hand.task(rule=CFG(), steps=2, seed=k), group=group) for k in range(60)]
    model = Toy()
    engine = started(model, None, deterministic=True, guessed_costs={1: 0.01, 128: 0.01})
    model.seen.clear()
    run(engine, tasks)
    engine.stop(0)
    assert rows_of(model) == {128}


@pytest.fixture
def timed() -> Iterator[Callable[..., Engine]]:
    """Starts an engine of models whose forwards take the given seconds, by rows."""
    engines: list[Engine] = []

    def start(models: Mapping[Toy, Mapping[int, float]]) -> Engine:
        engine = Engine({model.facts.name: model for model in models}, deterministic=True)
        engines.append(engine)
        with (
            full_ticks(),
            patch("server.engine.warmup.time_forwards", lambda model, _: models[model]),
        ):
            engine.start()
            while not engine.ready:
                assert engine.failure is None, engine.failure
                Event().wait(0.01)
        return engine

    yield start
    for engine in engines:
        engine.stop(0)


class Roomless(Toy):
    """A toy with memory for 16 rows."""

    def evaluate(self, x: Tensor, t: Tensor, inputs: Any) -> Tensor:
        if len(x) > 16:
            raise torch.OutOfMemoryError
        return super().evaluate(x, t, inputs)


def test_forwards_have_no_more_rows_than_fitted_into_memory_at_the_start(
    timed: Callable[..., Engine],
) -> None:
    engine = timed({Roomless(): {1: 0.01, 4: 0.0101, 16: 0.0102}})
    found = run(engine, [by_hand.task(rule=CFG(), steps=2)])
    assert not found.errors


def test_an_images_time_is_that_of_ticks_of_so_few_rows(timed: Callable[..., Engine]) -> None:
    """Even where another model limits them, and their own could run more at the same cost."""
    engine = timed({Toy(): {1: 0.01, 128: 1.28}, Toy(name="flat"): {1: 1.0, 128: 1.0}})
    tasks = [replace(by_hand.task(rule=CFG(), steps=6), model="flat") for _ in range(20)]
    # 240 rows, of which 8 take a second.
    with pytest.raises(InvalidRequest, match="about 30 s of device time"):
        engine.submit(tasks, Ear(len(tasks)), Client("short of time", max_device_s=10))


def test_with_a_row_budget_all_forwards_have_as_many() -> None:
    model = Toy()
    engine = started(model, 20, deterministic=True, guessed_costs={1: 0.01, 128: 1.28})
    model.seen.clear()
    run(engine, [by_hand.task(rule=CFG(), steps=2, seed=seed) for seed in range(12)])
    engine.stop(0)
    assert rows_of(model) == {24}

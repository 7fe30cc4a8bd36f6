"""CFG norm in the engine: what it does to a run, alone and beside other images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance import CFG, PAG, CFGNorm
from samplers.heun import Heun
from server.engine.engine import Engine
from tests.server.by_hand import Asked, ByHand, task
from tests.server.toy_model import Toy, run, started


class LengthsByHand(ByHand):
    """CFG and a perturbation by hand, then the norm of each cell."""

    def guided(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        guided, moved = super().guided(i, x)
        for norm in self.task.settings:
            if isinstance(norm, CFGNorm) and norm.start <= self.progress[i] < norm.stop:
                cond = self.denoised(i, x, self.task.prompt_text)
                if norm.variant == "denoised":
                    ratio = cond.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
                    guided = guided * ratio.clamp(max=1) * norm.strength
                    continue
                alpha = float(self.plan.alpha[i])
                v, v_c = alpha * x - guided, alpha * x - cond
                full = v * v_c.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)
                guided = alpha * x - torch.lerp(v, full, norm.strength)
        return guided, moved


TASKS = [
    task(CFG(scale=6.0), settings=(CFGNorm(),), seed=1),
    task(CFG(scale=6.0), settings=(PAG(), CFGNorm(stop=0.5, strength=0.7)), seed=2),
    task(CFG(scale=6.0), settings=(CFGNorm(variant="denoised", strength=0.9),), seed=3),
    task(CFG(scale=6.0), settings=(PAG(),), sampler=Heun(), seed=4),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = started(Toy(), 16)
    yield made
    made.stop(0)


def test_a_mix_is_what_each_image_is_by_hand(engine: Engine) -> None:
    ear = run(engine, list(TASKS))
    assert not ear.errors
    for k, one in enumerate(TASKS):
        expected = LengthsByHand(Toy(), one).pixels().astype(int)
        assert np.abs(ear.results[k].pixels - expected).max() <= 2


def test_it_changes_the_picture_and_costs_no_evaluation(engine: Engine) -> None:
    plain = task(CFG(scale=6.0), seed=1)
    ear = run(engine, [TASKS[0], plain])
    assert not np.array_equal(ear.results[0].pixels, ear.results[1].pixels)
    assert ear.results[0].evaluations == ear.results[1].evaluations


def test_an_image_is_bit_identical_alone_and_in_any_mix() -> None:
    engine = started(Toy(), 16, deterministic=True)
    try:
        together = run(engine, list(TASKS))
        alone: list[Asked] = TASKS[:3]
        for k, one in enumerate(alone):
            [result] = run(engine, [one]).results.values()
            assert np.array_equal(result.pixels, together.results[k].pixels)
    finally:
        engine.stop(0)

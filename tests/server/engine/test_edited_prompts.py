"""Prompts that change along a run, beside guidance, caches and other images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from guidance import NAG, EasyCache, Edit
from guidance.pag import PAG
from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.models.prompt_editing import Timeline, written_in
from tests.server.by_hand import TOGETHER, ByHand
from tests.server.by_hand import task as toy_task
from tests.server.toy_model import Toy, run, started

STEPS = 5
PROMPT, NEGATIVE = "[a circle:a star:1]", "[blue|red]"


def edited(text: str, evaluations: int = STEPS) -> str:
    return written_in("automatic1111", text, Timeline(evaluations))


class Changing(ByHand):
    """Gives the network these two prompts as they are at each stage, written out by hand."""

    def denoised(self, i: int, x: Tensor, text: str | None, *edits: Edit) -> Tensor:
        if str(text) == PROMPT:
            text = "a circle" if i <= 1 else "a star"
        elif str(text) == NEGATIVE:
            text = ("blue", "blue", "red", "blue", "red")[i]
        return super().denoised(i, x, text, *edits)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def of_toys(toy: Toy) -> Iterator[Engine]:
    made = started(toy, 16)
    yield made
    made.stop(0)


def test_every_rule_and_policy_reads_the_texts_of_its_stage(of_toys: Engine, toy: Toy) -> None:
    told: dict[str, Any] = {"prompt": edited(PROMPT), "negative_prompt": edited(NEGATIVE)}
    tasks = [
        toy_task(rule, policy, (PAG(scale=2),), steps=STEPS, seed=k, **told)
        for k, (rule, policy) in enumerate(TOGETHER)
    ]
    ear = run(of_toys, tasks)
    assert not ear.errors, ear.errors
    for k, one in enumerate(tasks):
        expected = Changing(toy, one).pixels().astype(int)
        assert np.abs(ear.results[k].pixels - expected).max() <= 2, (one.rule, one.policy)


def test_a_stage_whose_texts_have_changed_is_not_recalled(of_toys: Engine) -> None:
    """Otherwise the cache would reuse the network's output for the previous text."""
    steps, cache = 20, EasyCache(threshold=0.8, start=0.1)
    prompts = "a circle", edited("a [circle|star]", steps)
    ear = run(of_toys, [toy_task(prompt=one, steps=steps, cache=cache) for one in prompts])
    assert [ear.results[i].saved > 0 for i in range(2)] == [True, False]


def test_images_of_a_batch_keep_their_bits_beside_edited_prompts(
    fixed_engine: Engine,
    task: Callable[..., ImageTask],
    run: Callable[[Engine, list[ImageTask]], Any],
) -> None:
    prompt, negative = edited("a [red:blue:1] circle", 3), edited("[:star:1]", 3)
    tasks = [
        task(prompt="a red circle"),
        task(prompt=prompt, negative_prompt=negative, settings=(NAG(scale=4.0),)),
    ]
    together = run(fixed_engine, tasks).pixels()
    for one, pixels in zip(tasks, together, strict=True):
        assert np.array_equal(run(fixed_engine, [one]).pixels()[0], pixels)

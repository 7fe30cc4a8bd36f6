"""An image of blended prompts equals one whose conditioning was mixed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.models.blend import Blend
from server.models.conditioning import Conditioning
from server.models.hosted import HostedModel

RED, BLUE = "a small red circle on a white background", "a large blue square"

Make = Callable[..., ImageTask]
Start = Callable[..., Engine]
Run = Callable[[Engine, list[ImageTask]], Any]


class Mixing:
    """The real model, in which "half" stands for the mean of two prompts' hidden states."""

    def __init__(self, model: HostedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_prompts(
        self, prompts: Sequence[str | None], width: int, height: int, *adapters: Any
    ) -> list[Conditioning]:
        red, blue = self._model.encode_prompts([RED, BLUE], width, height, *adapters)
        mean = {
            name: torch.from_numpy((red.tensors[name].numpy() + blue.tensors[name].numpy()) / 2)
            for name in red.tensors
        }
        made = self._model.encode_prompts(prompts, width, height, *adapters)
        return [
            Conditioning(mean, one.length) if text == "half" else one
            for text, one in zip(prompts, made, strict=True)
        ]


def test_a_blend_is_the_image_of_the_mixed_conditioning_in_every_prediction_that_is_told_it(
    start: Start, model: HostedModel, task: Make, run: Run
) -> None:
    from guidance.pag import PAG

    blend = Blend(((RED, 2.0), (BLUE, 2.0)))
    told = {"settings": (PAG(scale=2.0),), "steps": 4}
    [mixed] = run(start(), [task(prompt=blend, **told)]).pixels()
    [by_hand] = run(start(model=Mixing(model)), [task(prompt="half", **told)]).pixels()
    assert np.abs(mixed.astype(int) - by_hand.astype(int)).max() <= 1


def test_a_blend_of_which_one_part_has_all_weight_is_that_prompt(
    fixed_engine: Engine, task: Make, run: Run
) -> None:
    tasks = [task(prompt=Blend(((RED, 1.0), (BLUE, 0.0)))), task(prompt=RED), task(prompt=BLUE)]
    alone, red, blue = (run(fixed_engine, [one]).pixels()[0] for one in tasks)
    assert np.array_equal(alone, red)
    assert not np.array_equal(red, blue)


def test_a_prompt_that_cannot_be_read_ends_its_own_image_alone(
    engine: Engine, task: Make, run: Run
) -> None:
    unreadable = Blend(cast("Any", None))
    heard = run(engine, [task(prompt=RED), task(prompt=unreadable)]).wait()
    assert {index: type(error) for index, error in heard.errors.items()} == {1: TypeError}
    assert set(heard.results) == {0}
    run(engine, [task(prompt=BLUE)]).pixels()

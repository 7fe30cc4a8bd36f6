"""The model decides which images can share a forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from server.models.adapters.adapter import RowAdapters
from server.models.conditioning import Conditioning, StackedConditioning
from server.models.inputs import RowInputs
from server.models.text_options import AS_USUAL, TextOptions
from tests.server.by_hand import task
from tests.server.toy_model import Toy, run, started

PROMPTS = ("one", "two words", "again", "here are three")


class Wordy(Toy):
    """A toy whose conditioning has one token per word; rows of a forward must be equally long."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        made: list[Conditioning] = []
        for one, prompt in zip(
            super().encode_prompts(prompts, width, height), prompts, strict=True
        ):
            words = max(1, len((prompt or "").split()))
            made.append(Conditioning({"shift": one.tensors["shift"].expand(words)}, words))
        return made

    def group_key(self, width: int, height: int, length: int) -> int:
        return length

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        shift = inputs.conditioning.tensors["shift"]
        self.lengths.append(shift.shape[1])
        told = StackedConditioning({"shift": shift.mean(1)})
        return super().evaluate(x, t, RowInputs(told))


def unguided(prompt: str, seed: int):
    return task(prompt=prompt, negative_prompt=prompt, seed=seed, steps=2)


def test_images_whose_lengths_may_not_be_mixed_run_in_lanes_of_their_own() -> None:
    model = Wordy()
    engine = started(model, 8)
    model.lengths.clear()
    tasks = [unguided(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert set(model.lengths) == {1, 2, 3}
    for index, one in enumerate(tasks):
        alone = run(engine, [one]).results[0]
        assert np.abs(alone.pixels.astype(int) - ear.results[index].pixels).max() <= 1
    engine.stop(0)


def test_by_default_all_images_of_a_shape_share_a_forward() -> None:
    model = Toy()
    engine = started(model, 8)
    model.seen.clear()
    run(engine, [unguided(prompt, seed) for seed, prompt in enumerate(PROMPTS)])
    assert max(len(x) for x in model.seen) == 2 * len(PROMPTS)
    engine.stop(0)

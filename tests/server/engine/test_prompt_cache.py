"""Prompts are encoded together, kept up to a limit, and fail alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.state.prompt_cache import ENCODER_BATCH, PromptCache
from server.models.conditioning import Conditioning

BYTES = 24
SIZE = 64, 64


class Encoder:
    """Stands in for a model's text encoder; fails for prompts that say so."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls: list[list[str]] = []

    def encode_prompts(self, prompts, width, height, *how):
        self.calls.append(list(prompts))
        if "a bad one" in prompts:
            raise RuntimeError("cannot encode this")
        hidden = torch.stack([torch.full((2, 3), float(len(prompt or ""))) for prompt in prompts])
        return [Conditioning({"hidden": one}, 2) for one in hidden]


def value(conditioning: Conditioning | Exception) -> float:
    assert isinstance(conditioning, Conditioning)
    return float(conditioning.tensors["hidden"][0, 0])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_prompt_that_cannot_be_encoded_fails_alone(fixed):
    encoder: Any = Encoder()
    prompts = ["x" * (k + 1) for k in range(ENCODER_BATCH)]
    prompts[5] = "a bad one"
    encoded = PromptCache(encoder, fixed=fixed).of(prompts, *SIZE)
    assert isinstance(encoded.pop("a bad one"), RuntimeError)
    assert {text: value(one) for text, one in encoded.items()} == {t: len(t or "") for t in encoded}
    assert len(encoder.calls) <= 9, "halved, not one by one"
    if fixed:
        assert {len(call) for call in encoder.calls} == {ENCODER_BATCH}


def test_prompts_are_kept_up_to_a_bound_of_bytes():
    encoder: Any = Encoder()
    cache = PromptCache(encoder, fixed=False, max_bytes=3 * BYTES)
    for prompts in (["a", "b", "c"], ["a"], ["d"], ["a", "c", "d"]):
        cache.of(prompts, *SIZE)
    assert encoder.calls == [["a", "b", "c"], ["d"]]
    cache.of(["b"], *SIZE)
    assert encoder.calls[-1] == ["b"]
    cache.of(["b"], 32, 64)
    assert len(encoder.calls) == 4, "another size is told otherwise"


def test_a_prompt_is_encoded_for_each_size_once():
    encoder: Any = Encoder()
    cache = PromptCache(encoder, fixed=False)
    for size in ((64, 64), (64, 32), (64, 64), (32, 64)):
        cache.of(["a", None], *size)
    assert encoder.calls == [["a", None]] * 3


def test_more_prompts_than_are_kept_are_all_there_at_once():
    encoder: Any = Encoder()
    encoded = PromptCache(encoder, fixed=False, max_bytes=BYTES).of(["a", "bb", "ccc"], *SIZE)
    assert [value(encoded[text]) for text in ("a", "bb", "ccc")] == [1, 2, 3]


def test_what_is_kept_does_not_hold_what_was_encoded_with_it():
    encoder: Any = Encoder()
    encoded = PromptCache(encoder, fixed=True).of(["a"], *SIZE)["a"]
    assert isinstance(encoded, Conditioning)
    hidden = encoded.tensors["hidden"]
    assert hidden.untyped_storage().nbytes() == hidden.nbytes == BYTES


def test_an_image_whose_prompt_cannot_be_encoded_is_the_only_one_to_fail(start, model, task, run):
    class Choosy:
        """The real model, whose text encoder cannot take one prompt."""

        def __getattr__(self, name):
            return getattr(model, name)

        def encode_prompts(self, prompts, width, height, *how):
            if "a bad one" in prompts:
                raise RuntimeError("cannot encode this")
            return model.encode_prompts(prompts, width, height, *how)

    engine = start(model=Choosy())
    heard = run(engine, [task(steps=1), task(steps=1, prompt="a bad one"), task(steps=1)])
    assert list(heard.errors) == [1]
    assert sorted(heard.results) == [0, 2]

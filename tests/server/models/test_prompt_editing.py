"""Prompts that change along a run, compared with AUTOMATIC1111's schedules and diffusers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.prompt_editing import Timeline, texts_along
from tests.server.models.alike import as_diffusers, task_of, their_start
from tests.server.models.tiny_sd import make
from tests.server.models.tiny_sdxl import BASE, saved
from tests.server.toy_model import run

Schedule: TypeAlias = "list[tuple[int, str]]"
"""Texts, each with the evaluation until which it lasts."""


def in_turns(*texts: str) -> Schedule:
    return list(enumerate(texts, 1))


# What `get_learned_conditioning_prompt_schedules` of AUTOMATIC1111 1.10 returns for 10 steps; the
# examples of its docstring come first.
THEIRS: dict[str, Schedule] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [
        *in_turns("a", "(b:1.1)", "a", "(b:1.1)", "a", "(b:1.1)", "a", "(b:1.1)", "a", "(b:1.1)")
    ],
    "[fe|]male": [
        *in_turns(
            "female", "male", "female", "male", "female", "male", "female", "male", "female", "male"
        )
    ],
    "[fe|||]male": [
        *in_turns(
            "female", "male", "male", "male", "female", "male", "male", "male", "female", "male"
        )
    ],
    "a [word] and (two)": [(10, "a [word] and (two)")],
    "a[b::4]c": [(4, "abc"), (10, "ac")],
    "[[a:b:3]:6]": [(3, ""), (6, ""), (10, "b")],
    "[a|[b:c:3]]": [*in_turns("a", "b", "a", "c", "a", "c", "a", "c", "a", "c")],
    "[[a|b]:c:3]": [*in_turns("a", "b", "a", "c", "c", "c", "c", "c", "c", "c")],
    "[a|b] [c|d|e]": [
        *in_turns("a c", "b d", "a e", "b c", "a d", "b e", "a c", "b d", "a e", "b c")
    ],
    "([a:b:3]:1.2)": [(3, "(a:1.2)"), (10, "(b:1.2)")],
    "a BREAK [b:c:3]": [(3, "a BREAK b"), (10, "a BREAK c")],
    "\\[a:b:3\\]": [(10, "\\[a:b:3\\]")],
    "[a\\:x:b:3]": [(3, "a\\:x"), (10, "b")],
    "[a:b:0.29]": [(2, "a"), (10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:1e0]": [(1, "a"), (10, "b")],
    "[a:b:+3]": [(3, "a"), (10, "b")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:0]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[3:4]": [(4, ""), (10, "3")],
    "[a\n:b\n:3\n]": [(3, "a\n"), (10, "b\n")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[a|b:3]": [(10, "[a|b:3]")],
    "(a|b) [c:d:3]": [(10, "(a|b) [c:d:3]")],
    "a|b [c:d:3]": [(10, "a|b [c:d:3]")],
    "[x:[a:b]:3]": [(10, "[x:[a:b]:3]")],
    "[ (a:b:3]": [(10, "[ (a:b:3]")],
    "[[a:b:3]": [(3, "[a"), (10, "[b")],
    "[a:b:3]:4]": [(3, "a:4]"), (10, "b:4]")],
    "[a:b:3 c]": [(10, "[a:b:3 c]")],
    "[c:d:3] end\\": [(10, "[c:d:3] end\\")],
}

# The same for a second run of 8 steps after 10 steps.
AGAIN: dict[str, Schedule] = {
    "a [b:.5] c": [(8, "a b c")],
    "a [b:1.5] c": [(4, "a  c"), (8, "a b c")],
    "[a:b:13]": [(3, "a"), (8, "b")],
    "[a:b:3]": [(8, "b")],
    "[a:b:1.0]": [(8, "b")],
    "[a|b]": [*in_turns("a", "b", "a", "b", "a", "b", "a", "b")],
}


def looked_up(schedule: Schedule, evaluations: int) -> list[str]:
    """The text at each evaluation, counted from 0, as ``reconstruct_cond_batch`` looks it up."""
    return [next(text for last, text in schedule if at <= last) for at in range(evaluations)]


@pytest.mark.parametrize(
    ("table", "timeline"),
    [(THEIRS, Timeline(10)), (AGAIN, Timeline(8, before=10))],
    ids=["first run", "second run"],
)
def test_schedules_are_those_of_automatic1111(
    table: dict[str, Schedule], timeline: Timeline
) -> None:
    for prompt, schedule in table.items():
        found = texts_along(prompt, timeline)
        assert len(found) in (1, timeline.evaluations), prompt
        often = [*found] * (timeline.evaluations // len(found))
        assert often == looked_up(schedule, timeline.evaluations), prompt


def test_no_prompt_takes_long_to_read() -> None:
    began = time.process_time()
    deep = "[a:" * 2000 + "b" + ":3]" * 2000
    for hostile in ("[" * 8000, "[a:" * 2500, "[(" * 4000, "[:" + " " * 8000, deep, "[a:b:1e999]"):
        assert texts_along(hostile, Timeline(10))
    # As often as for a request with several prompts and two long runs.
    for _ in range(20):
        assert len([*texts_along("[a|b]" * 400 + "()" * 1000, Timeline(400))]) == 400
    assert time.process_time() - began < 1.5


WIDTH, HEIGHT, STEPS = 64, 48, 6
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
RED, STAR = "a red circle", "a green star"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = make(BASE)
    # States of trained encoders have a mean; those of a fresh layer norm do not.
    made.text_encoder.final_layer_norm.bias.data.fill_(0.3)
    return made


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = saved(pipeline, tmp_path_factory.mktemp("models") / "sd")
    return load_model(folder, name="sd", device="cpu", dtype="float32")


def asked(model: HostedModel, prompt: str, negative: str = "") -> ImageTask:
    body = as_diffusers(prompt, WIDTH, HEIGHT, STEPS)
    return task_of(model, **body, negative_prompt=negative, prompt_syntax="automatic1111")


@torch.inference_mode()
def drawn(
    pipeline: Any, prompt: Callable[[int], str], negative: Callable[[int], str] = lambda _: ""
) -> Tensor:
    """Final latents of diffusers' pipeline with the texts of each step, counted from 0."""

    def told(step: int) -> Tensor:
        texts = (negative(step), prompt(step))
        return torch.cat([encoded(pipeline, text) for text in texts])

    def swap(_: Any, step: int, __: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        return kept | {"prompt_embeds": told(step + 1)}

    first = told(0)
    answer = pipeline(
        prompt_embeds=first[1:],
        negative_prompt_embeds=first[:1],
        latents=their_start(pipeline, STEPS, SHAPE),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        width=WIDTH,
        height=HEIGHT,
        output_type="latent",
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    return answer.images[0]


def encoded(pipeline: Any, text: str) -> Tensor:
    """Hidden states of a text, ``[1, tokens, features]``."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state


def test_images_of_one_batch_are_those_of_diffusers_whose_prompts_are_swapped_at_these_steps(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    tasks = [
        asked(model, f"[{RED}:{STAR}:.5]"),
        asked(model, f"[{RED}|{STAR}|a square]"),
        asked(model, "a [red ::2]circle", "[[a blue:3] star:4]"),
        asked(model, RED),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    turns = [RED, RED, STAR, "a square", RED, STAR, ""]
    expected = [
        drawn(pipeline, lambda step: RED if step <= 3 else STAR),
        drawn(pipeline, turns.__getitem__),
        drawn(
            pipeline,
            lambda step: "a red circle" if step <= 2 else "a circle",
            lambda step: "" if step <= 4 else "a blue star",
        ),
        drawn(pipeline, lambda _: RED),
    ]
    for one in expected:
        errors = sorted(float((own - one).norm() / one.norm()) for own in decoded)
        assert errors[0] < 1e-5
        assert errors[1] > 1e-3


def test_texts_of_unlike_length_take_turns(
    model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """Texts of one chunk and of two; the longer one is the shorter one, twice."""
    run(engine, [asked(model, f"[{RED}:{RED} BREAK {RED}:2]"), asked(model, RED)])
    changing, plain = decoded
    assert float((changing - plain).norm() / plain.norm()) < 1e-5

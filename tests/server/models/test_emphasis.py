"""Weighted and long prompts, compared with AUTOMATIC1111's examples and formulas by hand."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.errors import InvalidRequest
from server.models.emphasis import (
    MAX_CHUNKS,
    Chunk,
    EmphasizedPrompt,
    Segment,
    chunks_of,
    escaped,
    is_long,
    is_weighted,
    segments_of,
)
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.prompt_editing import Timeline, texts_along
from server.models.unet_model import TEXT
from server.requests.conjunction import split_prompt
from server.requests.lora_tags import read_tags
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.models.tiny_sd import make
from tests.server.models.tiny_sdxl import BASE, saved
from tests.server.models.tiny_sdxl import make as make_xl
from tests.server.toy_model import run

# Examples from the docstring of `parse_prompt_attention` in AUTOMATIC1111.
THEIRS: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("text", THEIRS)
def test_weights_are_read_as_there(text: str) -> None:
    found = segments_of(text)
    assert [segment.text for segment in found] == [part for part, _ in THEIRS[text]]
    weights = [segment.weight or 0 for segment in found]
    assert weights == pytest.approx([weight for _, weight in THEIRS[text]])


def test_a_break_begins_a_chunk_and_takes_the_blanks_around_it() -> None:
    broken = [Segment("a cat", 1.0), Segment("", None), Segment("a dog", 1.0)]
    assert segments_of("a cat  BREAK\na dog") == broken
    assert segments_of("a BREAKFAST") == [Segment("a BREAKFAST", 1.0)]


def test_weights_are_bounded() -> None:
    assert segments_of("(" * 5000 + "a") == [Segment("a", 16.0)]
    assert segments_of("(a:-1e) b")[0].text.startswith("a:-1e")
    assert segments_of("(a:-99)") == [Segment("a", -16.0)]


def test_no_text_takes_long_to_read() -> None:
    began = time.process_time()
    for hostile in (" " * 8000, ":" + " " * 8000, ":" + "1" * 8000, "(a" * 4000, "(a[b" * 2000):
        segments_of(hostile)
    assert time.process_time() - began < 1.5


def tokenize(text: str) -> list[tuple[int, ...]]:
    """One token per letter; 0 is the comma, and a capital letter is three tokens."""
    return [
        (0,) if letter == "," else (ord(letter),) * (3 if letter.isupper() else 1)
        for letter in text
    ]


def chunked(text: str, room: int) -> list[str]:
    found = chunks_of([Segment(text, 2.0)], tokenize, comma=0, room=room)
    assert all(chunk.weights == (2.0,) * len(chunk.tokens) for chunk in found)
    return ["".join("," if token == 0 else chr(token) for token in one.tokens) for one in found]


def test_a_full_chunk_breaks_after_a_comma_that_is_near() -> None:
    assert chunked("abcdef", 4) == ["abcd", "ef"]
    assert chunked("ab,cdef", 4) == ["ab,", "cdef"]
    assert chunked("abcd,ef", 4) == ["abcd", ",ef"]
    assert chunked("", 4) == [""]
    far = "," + "x" * 40
    assert chunked(far, 40) == ["," + "x" * 39, "x"]
    near = "x" * 25 + "," + "y" * 19
    assert chunked(near, 40) == ["x" * 25 + ",", "y" * 19]


def test_the_tokens_of_an_embedding_stay_in_one_chunk() -> None:
    assert chunked("abA", 4) == ["ab", "AAA"]
    assert chunked("aAAb", 4) == ["aAAA", "AAAb"]
    assert chunked("ab,cA", 4) == ["ab,", "cAAA"]
    assert chunked("a,bcA", 4) == ["a,", "bc", "AAA"]


def test_a_break_leaves_a_chunk_unfilled() -> None:
    parts = [Segment("ab", 1.0), Segment("", None), Segment("c", 0.5)]
    found = chunks_of(parts, tokenize, comma=0, room=4)
    assert found == [Chunk((97, 98), (1.0, 1.0)), Chunk((99,), (0.5,))]


def test_a_text_needs_the_syntax_only_if_it_uses_it() -> None:
    assert not is_weighted("a cat: 1, or two")
    assert all(map(is_weighted, ("(a)", "a [b]", r"\(", "a BREAK b")))
    assert is_long("é" * 40)
    assert not is_long("e" * 40)


PLAIN = "a [red|(blue:1.2)] (circle) \\o/ AND a BREAK, <lora:x:1> :1 ]) ANDY <3 \\"


@pytest.mark.parametrize("text", [PLAIN, "[a:b:0.5]", "BREAK", "a red circle"])
def test_a_plain_text_that_is_escaped_says_the_same_in_the_syntax(text: str) -> None:
    written = escaped(text)
    assert segments_of(written) == [Segment(text, 1.0)]
    assert texts_along(written, Timeline(10)) == (written,)
    assert split_prompt(written) == [(written, 1.0)]
    assert read_tags(written).prompt == written


@pytest.mark.parametrize("text", ["a screen of 16:9", "a clock, 12: .5 ", "16:9 and AND 4:3"])
def test_a_number_at_the_end_of_a_plain_text_is_no_weight_in_its_text(text: str) -> None:
    # AUTOMATIC1111 also reads it as one without AND (modules/prompt_parser.py).
    weight = re.compile(r"^((?:\s|.)*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*$")
    written = escaped(text)
    assert (found := weight.search(written))
    assert found[2] is None
    assert segments_of(written) == [Segment(text, 1.0)]


def test_a_weighted_prompt_is_no_plain_text() -> None:
    assert EmphasizedPrompt("a") == EmphasizedPrompt("a")
    assert len({EmphasizedPrompt("a"), "a", EmphasizedPrompt("a")}) == 2


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


@torch.inference_mode()
def text_of(model: HostedModel, prompt: str | None) -> Tensor:
    [one] = model.encode_prompts([prompt], 64, 64)
    return one.tensors[TEXT]


@torch.inference_mode()
def by_hand(pipeline: Any, text: str, weights: dict[str, float]) -> Tensor:
    """One chunk: the encoder's output, times the weight of each word's tokens."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
    hidden = encoder(ids).last_hidden_state[0].double()
    factors = torch.ones(length, 1, dtype=torch.float64)
    position = 1
    for word in text.split():
        count = len(tokenizer(word, add_special_tokens=False).input_ids)
        factors[position : position + count] = weights.get(word, 1.0)
        position += count
    weighed = hidden * factors
    return (weighed * hidden.mean() / weighed.mean()).float()


def test_without_weights_a_prompt_is_encoded_as_plain_text(model: HostedModel) -> None:
    assert torch.equal(
        text_of(model, EmphasizedPrompt("a red circle")), text_of(model, "a red circle")
    )


def test_weights_scale_hidden_states_and_keep_their_mean(model: HostedModel, pipeline: Any) -> None:
    found = text_of(model, EmphasizedPrompt("a (red:1.5) [circle]"))
    expected = by_hand(pipeline, "a red circle", {"red": 1.5, "circle": 1 / 1.1})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_chunks_are_encoded_apart_and_stand_one_behind_the_other(model: HostedModel) -> None:
    found = text_of(model, EmphasizedPrompt("a red circle BREAK a (blue:2) square"))
    first, second = (
        text_of(model, EmphasizedPrompt(text)) for text in ("a red circle", "a (blue:2) square")
    )
    torch.testing.assert_close(found, torch.cat([first, second]))
    room = model.facts.max_tokens
    assert model.count_tokens(EmphasizedPrompt("a BREAK b")) == 2 * room
    assert len(text_of(model, EmphasizedPrompt("red " * (room + 1)))) == 2 * len(first)


@torch.inference_mode()
def test_a_text_that_is_repeated_is_attended_to_as_it_is_once(model: HostedModel) -> None:
    """So rows with texts of different lengths share a forward without a mask."""
    short, long = model.encode_prompts(["a cat", EmphasizedPrompt("a BREAK b BREAK c")], 64, 64)
    [same] = model.encode_prompts([EmphasizedPrompt("a dog BREAK a cat")], 64, 64)
    levelled = model.equalize_lengths({"a": short, "b": long, "c": same})
    assert {one.length for one in levelled.values()} == {6 * short.length}
    # The repetition takes no memory of its own.
    assert [one.nbytes for one in levelled.values()] == [
        short.nbytes,
        3 * short.nbytes,
        2 * short.nbytes,
    ]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    for told, one in {"a": short, "b": long}.items():
        once = model.evaluate(x, t, RowInputs(model.stack([one])))
        often = model.evaluate(x, t, RowInputs(model.stack([levelled[told]])))
        torch.testing.assert_close(often, once, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_two_encoders_have_weights_each_and_pool_the_first_chunk(tmp_path: Path) -> None:
    folder = saved(make_xl(BASE), tmp_path / "xl")
    model = load_model(folder, name="xl", device="cpu", dtype="float32")
    plain, same, weighted, long = model.encode_prompts(
        [
            "a cat",
            EmphasizedPrompt("a cat"),
            EmphasizedPrompt("a (cat:2)"),
            EmphasizedPrompt("a cat BREAK b"),
        ],
        64,
        64,
    )
    for name in plain.tensors:
        torch.testing.assert_close(same.tensors[name], plain.tensors[name])
    assert not torch.allclose(weighted.tensors[TEXT], plain.tensors[TEXT])
    assert long.length == 2 * plain.length
    torch.testing.assert_close(long.tensors["text_embeds"], plain.tensors["text_embeds"])
    torch.testing.assert_close(long.tensors[TEXT][: plain.length], plain.tensors[TEXT])


def asked(model: HostedModel, **fields: Any) -> ImageTask:
    body = {"prompt": "a", "width": 64, "height": 48, "steps": 2, "seed": 5, "sampler": "euler"}
    resolved = resolve(GenerateRequest.model_validate(body | fields), model, Limits(), None)
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    [task] = tasks_of(prepare(resolved, model, make_plan(schedule, *layout)), model)
    return task


def test_images_of_texts_of_different_lengths_run_at_once(
    model: HostedModel, engine: Engine
) -> None:
    """A negative prompt of two chunks beside a prompt of three, and others of one."""
    weighted = {"prompt_syntax": "automatic1111", "negative_prompt": "x BREAK y"}
    tasks = [asked(model, prompt="a BREAK b BREAK c", **weighted), asked(model)]
    together = run(engine, tasks).results
    for index, task in enumerate(tasks):
        alone = run(engine, [task]).results[0].pixels.astype(int)
        assert np.abs(together[index].pixels - alone).max() <= 1
    assert (together[0].pixels != together[1].pixels).any()


def test_a_prompt_of_too_many_chunks_is_refused(model: HostedModel) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt has .* tokens; .* at most"):
        asked(model, prompt="a BREAK " * MAX_CHUNKS + "b", prompt_syntax="automatic1111")

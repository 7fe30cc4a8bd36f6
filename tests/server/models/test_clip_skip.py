"""Hidden states of earlier layers of CLIP are those that diffusers' pipelines read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.errors import InvalidRequest
from server.models.emphasis import EmphasizedPrompt
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.text_options import TextOptions
from server.models.unet_model import TEXT
from server.requests.chosen import notes_for
from server.requests.reading import Reading
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models import tiny_sd3
from tests.server.models.alike import as_diffusers, task_of, their_start
from tests.server.models.tiny_sd import make
from tests.server.models.tiny_sdxl import BASE, saved
from tests.server.models.tiny_sdxl import make as make_xl
from tests.server.toy_model import Toy, run

PROMPT, NEGATIVE = "a large red circle", "a green star"
WIDTH, HEIGHT, STEPS = 64, 48, 3
SHAPE = (4, HEIGHT // 2, WIDTH // 2)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = make(BASE)
    # Like a trained norm, so that a state without its norm is noticed.
    made.text_encoder.final_layer_norm.bias.data.fill_(0.3)
    return made


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    return load(saved(pipeline, tmp_path_factory.mktemp("models") / "sd"))


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="sd", device="cpu", dtype="float32")


@torch.inference_mode()
def read(model: HostedModel, prompt: str | None, skip: int | None) -> Tensor:
    [one] = model.encode_prompts([prompt], WIDTH, HEIGHT, None, TextOptions(clip_skip=skip))
    return one.tensors[TEXT]


@pytest.fixture(autouse=True)
def as_diffusers_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 has no inner model in this class, but diffusers 0.42 expects one."""
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


@torch.inference_mode()
def theirs(pipeline: Any, prompt: str, clip_skip: int | None) -> Tensor:
    """Hidden states by diffusers, which counts from 1 at the layer before its default."""
    encoded = pipeline.encode_prompt(
        prompt,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    return encoded[0][0]


def test_each_layer_is_that_of_diffusers(pipeline: Any, model: HostedModel) -> None:
    assert list(model.facts.clip_skips) == [1, 2, 3]
    for skip, their in ((None, None), (1, 0), (2, 1), (3, 2)):
        torch.testing.assert_close(read(model, PROMPT, skip), theirs(pipeline, PROMPT, their))
    assert torch.equal(read(model, PROMPT, 1), read(model, PROMPT, None))


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (lambda: make_xl(BASE), {"prompt_2": None}),
        (tiny_sd3.make, {"prompt_2": None, "prompt_3": None}),
    ],
    ids=["xl", "sd3"],
)
@torch.inference_mode()
def test_models_that_read_the_layer_before_the_last_begin_with_that(
    made: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = made()
    model = load(saved(pipeline, tmp_path / "model"))
    assert list(model.facts.clip_skips) == [2, 3]
    for skip, their in ((None, None), (2, 0), (3, 1)):
        expected, *_ = pipeline.encode_prompt(
            PROMPT, **options, do_classifier_free_guidance=False, clip_skip=their
        )
        # T5's tokens come after those of CLIP.
        places = pipeline.tokenizer.model_max_length
        torch.testing.assert_close(read(model, PROMPT, skip)[:places], expected[0, :places])


def test_weights_and_chunks_are_those_of_the_layer(model: HostedModel) -> None:
    plain = read(model, "a red circle", 2)
    torch.testing.assert_close(read(model, EmphasizedPrompt("a red circle"), 2), plain)
    weighted = read(model, EmphasizedPrompt("a (red:1.5) circle"), 2)
    expected = plain.clone()
    expected[2] *= 1.5
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-5)
    both = read(model, EmphasizedPrompt("a red circle BREAK a (red:1.5) circle"), 2)
    torch.testing.assert_close(both, torch.cat([plain, weighted]))


def asked(model: HostedModel, **fields: Any) -> ImageTask:
    body: dict[str, Any] = as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS)
    body["negative_prompt"] = NEGATIVE
    return task_of(model, **body | fields)


@torch.inference_mode()
def drawn(pipeline: Any, clip_skip: int | None) -> Tensor:
    """Final latents of diffusers, which, unlike Weft, leaves the negative prompt's layer alone."""
    answer = pipeline(
        PROMPT,
        negative_prompt_embeds=theirs(pipeline, NEGATIVE, clip_skip)[None],
        clip_skip=clip_skip,
        latents=their_start(pipeline, STEPS, SHAPE),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        width=WIDTH,
        height=HEIGHT,
        output_type="latent",
    )
    return answer.images[0]


def test_images_of_several_layers_in_one_batch_are_each_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """The prompts are the same each time, so that a cached one could be mistaken for another."""
    ear = run(engine, [asked(model), asked(model, clip_skip=2), asked(model, clip_skip=3)])
    assert not ear.errors, ear.errors
    for their in (None, 1, 2):
        expected = drawn(pipeline, their)
        errors = [float((one - expected).norm() / expected.norm()) for one in decoded]
        assert sorted(errors)[0] < 1e-5
        assert sorted(errors)[1] > 1e-2


def test_layers_that_the_model_does_not_have_are_refused(model: HostedModel) -> None:
    with pytest.raises(InvalidRequest, match=r"^clip_skip is 4; model 'sd' takes 1 to 3"):
        asked(model, clip_skip=4)


def test_a_model_without_clip_refuses_it_and_habitual_clients_are_told_so() -> None:
    request = GenerateRequest.model_validate({"prompt": "a", "clip_skip": 2})
    with pytest.raises(InvalidRequest, match=r"^clip_skip is 2, but model 'toy' reads no hidden"):
        resolve(request, Toy(), Limits(), None)
    habitual = request.read_as(Reading(habitual=True))
    resolved = resolve(habitual, Toy(), Limits(), None)
    assert resolved.clip_skip is None
    assert any("clip_skip is ignored" in note for note in notes_for(habitual, resolved, Toy()))

"""Stable Diffusion 3.5 is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img
from torch import Tensor

from guidance.edits import IdentityAttention
from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.errors import InvalidRequest, ModelMismatch
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.stable_diffusion_3 import POOLED, T5_LENGTH, TEXT
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.tiny_sd3 import CLIP_WIDTHS, make
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run, started

PROMPT = "a red circle"
WIDTH, HEIGHT = 48, 40
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
GUIDED: dict[str, Any] = {"name": "cfg", "scale": 4.0}
SKIPPING = {
    "name": "slg",
    "layers": ["transformer_blocks.1"],
    "scale": 2.8,
    "start": 0.0,
    "stop": 1.0,
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "sd3"
    pipeline.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="sd3", device="cpu", dtype="float32")


def asked(model: HostedModel, **fields: Any) -> Any:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "width": WIDTH,
        "height": HEIGHT,
        "seed": 5,
        "steps": 4,
        "guidance": GUIDED,
        **fields,
    }
    return task_of(model, **body)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, prompt: str = PROMPT, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    given: dict[str, Any] = {
        "latents": start_noise(seed, SHAPE)[None],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "width": WIDTH,
        "height": HEIGHT,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
    }
    return pipeline(prompt, **given | fields).images[0]


def test_final_latents_alone_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))
    # Without given sigmas, diffusers' scheduler shifts the last one twice.
    once = torch.linspace(1, 1 / 4, 4).tolist()
    assert_apart(decoded[0], theirs(pipeline, sigmas=once))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"prompt": "a star", "negative_prompt": "blue", "seed": 6},
        {"guidance": "none", "spacing": "trailing", "steps": 3, "seed": 7},
        {"sampler": "dpm_solver_pp", "guidance": "apg", "steps": 3, "seed": 8},
        {"guidance": GUIDED | {"perturbed": [SKIPPING]}, "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    assert_among(decoded, theirs(pipeline, 6, "a star", negative_prompt="blue"))
    sigmas = torch.linspace(1, 1 / 3, 3).tolist()
    plain: dict[str, Any] = {"guidance_scale": 1.0, "sigmas": sigmas, "num_inference_steps": 3}
    assert_among(decoded, theirs(pipeline, 7, **plain))
    skipped: dict[str, Any] = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_scale": 2.8,
        # Diffusers skips layers strictly after the start fraction and before the stop fraction.
        "skip_layer_guidance_start": -1,
        "skip_layer_guidance_stop": 1,
    }
    assert_among(decoded, theirs(pipeline, 9, **skipped))


@torch.inference_mode()
def test_the_text_is_that_of_all_three_encoders(pipeline: Any, model: HostedModel) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    length: dict[str, Any] = {"max_sequence_length": LENGTH}
    expected = pipeline.encode_prompt(PROMPT, None, None, **length)
    torch.testing.assert_close(ours.tensors[TEXT], expected[0][0])
    torch.testing.assert_close(ours.tensors[POOLED], expected[2][0])
    # T5 gets no mask, so its padding also changes the prompt's own tokens.
    tokens = pipeline.tokenizer_3(
        PROMPT, padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    masked = pipeline.text_encoder_3(**tokens).last_hidden_state[0]
    assert_apart(ours.tensors[TEXT][-LENGTH:], masked)
    # From CLIP it takes the state before the last layer, with features padded by zeros.
    first = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    last = pipeline.text_encoder(first, output_hidden_states=True).hidden_states[-1][0]
    clips = ours.tensors[TEXT][:-LENGTH]
    assert_apart(clips[:, : CLIP_WIDTHS[0]], last)
    assert not clips[:, sum(CLIP_WIDTHS) :].any()


def test_the_unconditional_is_the_empty_prompt(model: HostedModel) -> None:
    nothing, empty = model.encode_prompts([None, ""], WIDTH, HEIGHT)
    for name in (TEXT, POOLED):
        assert torch.equal(nothing.tensors[name], empty.tensors[name])


@torch.inference_mode()
def test_without_t5_its_tokens_are_zeros(tmp_path: Path) -> None:
    pipeline = make(with_t5=False)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    expected = pipeline.encode_prompt(PROMPT, None, None)[0][0]
    torch.testing.assert_close(ours.tensors[TEXT], expected)
    assert not ours.tensors[TEXT][-T5_LENGTH:].any()
    assert model.facts.max_tokens == pipeline.tokenizer.model_max_length - 2


def test_a_picture_comes_back_from_its_latents_as_diffusers_scales_them(
    pipeline: Any, model: HostedModel
) -> None:
    pixels = torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1
    with torch.inference_mode():
        mean = pipeline.vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(model.encode_image(pixels), (mean - 0.0609) * 1.5305)


@torch.inference_mode()
def test_image_to_image_is_that_of_diffusers(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = torch.rand(3, HEIGHT, WIDTH) * 2 - 1
    run(engine, [asked(model, image=picture, strength=0.6, steps=4)])
    monkeypatch.setattr(
        pipeline_stable_diffusion_3_img2img,
        "randn_tensor",
        lambda *_, **__: start_noise(5, SHAPE)[None],
    )
    anew: Any = StableDiffusion3Img2ImgPipeline(**pipeline.components)
    anew.set_progress_bar_config(disable=True)
    # With as many channels as latents, it is taken for latents.
    given: dict[str, Any] = {"image": model.encode_image(picture[None]), "strength": 0.6}
    same = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "output_type": "latent"}
    told: dict[str, Any] = {"guidance_scale": 4.0, "max_sequence_length": LENGTH}
    made = anew(PROMPT, **told, **given, **same).images
    assert_among(decoded, made[0])


def test_a_shift_by_size_is_that_of_diffusers(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = dict(pipeline.components)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    changed: Any = StableDiffusion3Pipeline(**parts)
    changed.set_progress_bar_config(disable=True)
    changed.save_pretrained(tmp_path / "sd3")
    model = load(tmp_path / "sd3")
    seen: list[Tensor] = []
    decode, engine = model.decode, started(model, 2)
    monkeypatch.setattr(model, "decode", lambda latents: seen.extend(latents) or decode(latents))
    run(engine, [asked(model)])
    engine.stop(0)
    assert_among(seen, theirs(changed))


def test_a_terminal_sigma_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "sd3"))
    FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).save_pretrained(copy / "scheduler")
    with pytest.raises(ModelMismatch, match=r"shift_terminal '0\.1'; for Stable Diffusion 3 only"):
        load(copy)


def test_sides_beyond_its_positions_and_edits_of_its_attention_are_refused(
    model: HostedModel,
) -> None:
    assert model.facts.longest_side == 96
    with pytest.raises(InvalidRequest, match="width is 100; model 'sd3' draws at most 96"):
        asked(model, width=100)
    reason = model.refuses(IdentityAttention(("transformer_blocks.0",))) or ""
    assert reason.startswith("has a SD3Transformer2DModel, whose attention cannot be edited")


def test_a_bare_request_takes_what_the_model_was_made_for(folder: Path, tmp_path: Path) -> None:
    request, copy = GenerateRequest(prompt=PROMPT), Path(shutil.copytree(folder, tmp_path / "sd3"))
    for name, steps, guidance in (
        ("stable-diffusion-3.5-large-turbo", 4, "none"),
        ("", 28, "cfg"),
        (None, 4, "none"),
    ):
        if name is None:
            (copy / "weft").mkdir()
            (copy / "weft/defaults.json").write_text('{"convention": "sd35_turbo"}')
        file = copy / "transformer/config.json"
        config = json.loads(file.read_text()) | {"_name_or_path": name}
        file.write_text(json.dumps(config))
        settings = resolve(request, load(copy), Limits(), None).settings()
        assert settings["sampler"]["name"] == "euler"
        assert settings["spacing"]["name"] == "linspace"
        assert settings["spacing"]["twice_shifted"]
        assert (settings["steps"], settings["guidance"]["name"]) == (steps, guidance)

"""FLUX.2 klein is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.errors import ModelMismatch
from server.models.flux2 import TEXT
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.ineffective import warnings_for
from server.requests.resolve import make_plan, resolve
from server.requests.schema import GenerateRequest
from server.service.pixels import pixels_tensor
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, assert_skipped, task_of
from tests.server.models.tiny_flux2 import LENGTH, make
from tests.server.models.tiny_flux2 import TEXT as TINY_TEXT
from tests.server.models.tiny_sdxl import saved
from tests.server.toy_model import run

PROMPT = "a red circle"
WIDTH, HEIGHT = 32, 24
SHAPE = (16, HEIGHT // 4, WIDTH // 4)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(distilled=False)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(pipeline, tmp_path_factory.mktemp("models") / "klein")


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path, dtype: str = "float32") -> HostedModel:
    return load_model(folder, name="klein", device="cpu", dtype=dtype)


def asked(model: HostedModel, **fields: Any) -> ImageTask:
    usual: dict[str, Any] = {
        "prompt": PROMPT,
        "width": WIDTH,
        "height": HEIGHT,
        "steps": 4,
        "seed": 5,
    }
    return task_of(model, **usual | fields)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, steps: int = 4, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours and before its batch norm."""
    given = {
        "prompt": PROMPT,
        "latents": start_noise(seed, SHAPE)[None],
        "num_inference_steps": steps,
        "width": WIDTH,
        "height": HEIGHT,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
        **fields,
    }
    normal = pipeline.vae.bn
    cells = pipeline._patchify_latents(pipeline(**given).images)
    return normal(cells)[0]


def test_a_bare_request_to_the_base_model_is_drawn_as_diffusers_draws_it(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model, steps=None)])
    assert_among(decoded, theirs(pipeline, steps=50, guidance_scale=4.0))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {"guidance": {"name": "cfg", "scale": 3.0}},
        {"prompt": "a star", "guidance": "none", "steps": 3, "seed": 6},
        {"negative_prompt": "blue", "sampler": "dpm_solver_pp", "steps": 3, "seed": 7},
        {"sampler": "heun", "guidance": "apg", "spacing": "karras", "seed": 8},
        {"guidance": "none", "width": HEIGHT, "height": WIDTH, "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline, guidance_scale=3.0))
    assert_among(decoded, theirs(pipeline, 6, 3, prompt="a star", guidance_scale=1.0))
    # As many tokens at other positions: in one forward, both rows would get the positions of one.
    upright = start_noise(9, (SHAPE[0], SHAPE[2], SHAPE[1]))[None]
    size: dict[str, Any] = {"width": HEIGHT, "height": WIDTH, "latents": upright}
    assert_among(decoded, theirs(pipeline, guidance_scale=1.0, **size))
    assert_apart(theirs(pipeline, guidance_scale=3.0), theirs(pipeline, guidance_scale=1.0))


def test_images_that_refer_to_pictures_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    wide, small = picture(80, 64, seed=1), picture(64, 64, seed=2)
    other = picture(80, 64, seed=3)
    guided: dict[str, Any] = {"guidance": {"name": "cfg", "scale": 3.0}}
    company = [
        replace(asked(model, **guided), references=tensors(wide)),
        replace(asked(model, **guided, seed=6), references=tensors(small, wide)),
        replace(asked(model, guidance="none", steps=3, seed=7), references=tensors(other)),
        asked(model, guidance="none", seed=8),
    ]
    ear = run(engine, company)
    assert not ear.errors, ear.errors
    seen = list(decoded)
    expected = theirs(pipeline, image=[wide], guidance_scale=3.0)
    assert_among(seen, expected)
    both = theirs(pipeline, 6, image=[small, wide], guidance_scale=3.0)
    assert_among(seen, both)
    assert_among(seen, theirs(pipeline, 7, 3, image=[other], guidance_scale=1.0))
    assert_among(seen, theirs(pipeline, 8, guidance_scale=1.0))
    assert_apart(theirs(pipeline, guidance_scale=3.0), expected)
    assert_apart(theirs(pipeline, 6, image=[wide], guidance_scale=3.0), both)


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def tensors(*pictures: Image.Image) -> tuple[Tensor, ...]:
    return tuple(pixels_tensor(np.asarray(one)) for one in pictures)


def test_layers_of_the_text_encoder_that_nobody_reads_are_dropped(
    pipeline: Any, model: HostedModel, folder: Path, tmp_path: Path
) -> None:
    layers = model.modules()["text_encoder"].get_submodule("layers")
    assert (len(list(layers.children())), len(pipeline.text_encoder.model.layers)) == (28, 30)
    copy = Path(shutil.copytree(folder, tmp_path / "shallow"))
    sizes: dict[str, Any] = TINY_TEXT | {"num_hidden_layers": 27}
    short = Qwen3ForCausalLM(Qwen3Config(**sizes))
    short.save_pretrained(copy / "text_encoder")
    with pytest.raises(ModelMismatch, match="has 27 layers; the transformer needs more than"):
        load(copy)


def test_mu_follows_the_number_of_steps(model: HostedModel) -> None:
    few, many = (model.schedule(WIDTH, HEIGHT, steps) for steps in (4, 50))
    assert few != many


@pytest.mark.parametrize(
    ("sampler", "steps", "said"),
    [("lms", 4, True), ("lms", 8, True), ("lms", 50, False), ("plms", 4, False), ("hb", 4, False)],
)
def test_a_sampler_that_magnifies_errors_at_levels_near_noise_says_so(
    model: HostedModel, sampler: str, steps: int, said: bool
) -> None:
    asks = {"prompt": PROMPT, "sampler": sampler, "steps": steps}
    resolved = resolve(GenerateRequest.model_validate(asks), model, Limits(), None)
    schedule = model.schedule(resolved.width, resolved.height, steps)
    plan = make_plan(schedule, resolved.sampler, resolved.spacing, steps, None)
    warnings = " ".join(warnings_for(resolved, model, plan))
    assert ("amplifies errors of the model" in warnings) == said


@torch.inference_mode()
def test_three_layers_are_read_with_their_padding_and_without_thinking(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    expected, _ = pipeline.encode_prompt(PROMPT, max_sequence_length=LENGTH)
    torch.testing.assert_close(ours.tensors[TEXT], expected[0])
    assert ours.length == LENGTH
    other, _ = pipeline.encode_prompt(
        PROMPT, max_sequence_length=LENGTH, text_encoder_out_layers=(8, 17, 26)
    )
    assert_apart(ours.tensors[TEXT], other[0])
    encode, messages = pipeline.tokenizer, [{"role": "user", "content": PROMPT}]
    thinking = encode.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    tokens = encode(thinking, padding="max_length", max_length=LENGTH, return_tensors="pt")
    states = pipeline.text_encoder(**tokens, output_hidden_states=True).hidden_states
    sprung = torch.cat([states[layer][0] for layer in (9, 18, 27)], -1)
    assert_apart(ours.tensors[TEXT], sprung)


@torch.inference_mode()
def test_in_bfloat16_the_thousandfold_of_sigma_is_rounded_as_by_diffusers(folder: Path) -> None:
    half = load(folder, "bfloat16")
    told: list[float] = []
    embeds = half.modules()["transformer"].get_submodule("time_guidance_embed")
    embeds.register_forward_pre_hook(lambda _, args: told.append(float(args[0][0])))
    half.evaluate(torch.zeros(1, *SHAPE), torch.tensor([857.7]), half.inputs([PROMPT]))
    # Rounding sigma itself would have given 860.
    assert told == [856.0]


@torch.inference_mode()
def test_latents_are_normalised_by_the_batch_norm_of_the_autoencoder(
    pipeline: Any, model: HostedModel
) -> None:
    pixels = torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1
    latents = model.encode_image(pixels)
    torch.testing.assert_close(latents, pipeline._encode_vae_image(pixels, None))
    theirs = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(model.decode(latents), theirs, atol=1e-4, rtol=1e-3)
    assert_apart(theirs, pipeline.vae.decode(pipeline._unpatchify_latents(latents)).sample)


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_blocks_of_both_kinds_can_be_skipped(model: HostedModel, blocks: str) -> None:
    assert_skipped(model, start_noise(0, SHAPE), PROMPT, blocks)


def test_the_distilled_model_follows_its_own_convention(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "klein"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    own = load(copy).facts.defaults
    assert own is not None
    assert (own.convention, own.steps, own.rule.name) == ("flux2_klein", 4, "none")
    index["text_encoder"] = ["transformers", "Qwen3Model"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelMismatch, match="allowed are Qwen3ForCausalLM"):
        load(copy)

"""Qwen-Image is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.pipelines.qwenimage import pipeline_qwenimage_img2img
from safetensors.torch import load_file, save_file
from torch import Tensor

from guidance.edits import IdentityAttention
from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.errors import ModelMismatch
from server.models import transformer_model
from server.models.chat_text import TEXT
from server.models.conditioning import MASK
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.tiny_qwen_image import CHANNELS, make
from tests.server.toy_model import run

PROMPT = "a large red circle"
LONG = "a small blue square above " * 3
WIDTH, HEIGHT = 48, 40
SHAPE = (CHANNELS, HEIGHT // 2, WIDTH // 2)
GUIDED: dict[str, Any] = {"name": "cfg", "scale": 4.0, "cfg_norm": {"patch": 2}}
SKIPPING = {"name": "slg", "layers": ["transformer_blocks.1"], "start": 0.0, "stop": 1.0}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "qwen"
    pipeline.save_pretrained(made)
    return made


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """No config of this family states a size, and 1024 pixels are too many for a test."""
    with patch.object(transformer_model, "DEFAULT_SIDE", 48):
        yield


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="qwen", device="cpu", dtype="float32")


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
    noise = start_noise(seed, SHAPE)[None]
    given: dict[str, Any] = {
        "latents": pipeline._pack_latents(noise, *noise.shape),
        "negative_prompt": " ",
        "true_cfg_scale": 4.0,
        "num_inference_steps": 4,
        "width": WIDTH,
        "height": HEIGHT,
        "output_type": "latent",
    }
    packed = pipeline(prompt, **given | fields).images
    return pipeline._unpack_latents(packed, HEIGHT, WIDTH, 2)[0, :, 0]


def test_a_bare_request_is_drawn_as_diffusers_draws_it(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    request = GenerateRequest(prompt=PROMPT)
    settings = resolve(request, model, Limits(), None).settings()
    assert settings["steps"] == 50
    assert settings["guidance"]["cfg_norm"]["patch"] == 2
    run(engine, [asked(model, steps=6, guidance=None)])
    assert_among(decoded, theirs(pipeline, num_inference_steps=6))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"prompt": LONG, "negative_prompt": "a green star", "seed": 6},
        {"prompt": LONG, "guidance": "none", "steps": 3, "seed": 7},
        {"prompt": LONG * 2, "sampler": "dpm_solver_pp", "guidance": "apg", "seed": 8},
        {"guidance": {"name": "cfg", "perturbed": [SKIPPING]}, "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    assert_among(decoded, theirs(pipeline, 6, LONG, negative_prompt="a green star"))
    alone: dict[str, Any] = {"negative_prompt": None, "num_inference_steps": 3}
    assert_among(decoded, theirs(pipeline, 7, LONG, **alone))


def test_plain_guidance_and_a_schedule_without_its_terminal_are_something_else(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model, guidance={"name": "cfg", "scale": 4.0})])
    assert_apart(theirs(pipeline), decoded[-1])
    unshifted = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift_terminal=None)
    with patch.object(pipeline, "scheduler", unshifted):
        sprung = theirs(pipeline)
    assert_apart(theirs(pipeline), sprung)


@torch.inference_mode()
def test_a_row_beside_longer_texts_is_what_it_is_alone(model: HostedModel) -> None:
    told = model.encode_prompts(["", PROMPT, LONG], WIDTH, HEIGHT)
    x = torch.stack([start_noise(seed, SHAPE) for seed in range(3)])
    t = torch.tensor([100.0, 500.0, 900.0])
    together, fixed = model.stack(told), model.stack(told, fixed=True)
    assert {fixed.tensors[TEXT].shape[1], together.tensors[TEXT].shape[1]} == {
        512,
        max(one.length for one in told),
    }
    alone = [
        model.evaluate(x[row, None], t[row, None], RowInputs(model.stack([told[row]])))[0]
        for row in range(3)
    ]
    assert MASK not in model.stack(told[:1]).tensors
    for stacked in (together, fixed):
        made = model.evaluate(x, t, RowInputs(stacked))
        torch.testing.assert_close(made, torch.stack(alone), rtol=1e-4, atol=1e-5)
    together.tensors[MASK].fill_(True)
    assert_apart(alone[0], model.evaluate(x, t, RowInputs(together))[0])


@torch.inference_mode()
def test_attention_is_torchs_own_whatever_the_environment_says(
    model: HostedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As DIFFUSERS_ATTN_BACKEND sets it for the process.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.XFORMERS)
    other = load(folder)
    x, t = (
        torch.stack([start_noise(seed, SHAPE) for seed in range(2)]),
        torch.tensor([100.0, 500.0]),
    )
    inputs = model.inputs(["", LONG], WIDTH, HEIGHT)
    assert MASK in inputs.conditioning.tensors
    torch.testing.assert_close(other.evaluate(x, t, inputs), model.evaluate(x, t, inputs))


@torch.inference_mode()
def test_the_text_is_the_last_state_behind_the_head_of_the_template(
    pipeline: Any, model: HostedModel
) -> None:
    unconditional, spaced, ours = model.encode_prompts([None, " ", PROMPT], WIDTH, HEIGHT)
    expected, _ = pipeline.encode_prompt(PROMPT)
    torch.testing.assert_close(ours.tensors[TEXT], expected[0])
    assert torch.equal(unconditional.tensors[TEXT], spaced.tensors[TEXT])
    assert model.count_tokens(PROMPT) == len(PROMPT)
    # The vision tower and the output layer for words are not kept in memory.
    assert type(model.modules()["text_encoder"]).__name__ == "Qwen2_5_VLTextModel"
    # A longer prompt is truncated at the same place as in the pipeline.
    [cut] = model.encode_prompts(["a" * 600], WIDTH, HEIGHT)
    expected, _ = pipeline.encode_prompt("a" * 600, max_sequence_length=512)
    torch.testing.assert_close(cut.tensors[TEXT], expected[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_pictures_are_films_of_one_frame_whose_channels_have_their_own_scales(
    pipeline: Any, model: HostedModel
) -> None:
    pixels = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    latents = model.encode_image(pixels)
    assert latents.shape == (2, *SHAPE)
    mode = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name]).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(latents, (mode[:, :, 0] - mean) / deviation)
    torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(mode).sample[:, :, 0])


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
        pipeline_qwenimage_img2img,
        "randn_tensor",
        lambda *_, **__: start_noise(5, SHAPE)[None, None],
    )
    anew: Any = QwenImageImg2ImgPipeline(**pipeline.components)
    anew.set_progress_bar_config(disable=True)
    # With as many channels as latents, it is taken for latents.
    given: dict[str, Any] = {"image": model.encode_image(picture[None]), "strength": 0.6}
    same = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "output_type": "latent"}
    told: dict[str, Any] = {"negative_prompt": " ", "true_cfg_scale": 4.0}
    made = anew(PROMPT, **told, **given, **same).images
    assert_among(decoded, pipeline._unpack_latents(made, HEIGHT, WIDTH, 2)[0, :, 0])


@torch.inference_mode()
def test_a_folder_that_older_transformers_saved_is_read_alike(
    model: HostedModel, folder: Path, tmp_path: Path
) -> None:
    copy = copied(folder, tmp_path)
    file = copy / "text_encoder/config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope | {"rope_type": "default", "type": "default"}
    file.write_text(json.dumps(text | config))
    weights = copy / "text_encoder/model.safetensors"
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(older, weights, {"format": "pt"})
    [ours], [theirs_] = (one.encode_prompts([PROMPT], WIDTH, HEIGHT) for one in (load(copy), model))
    torch.testing.assert_close(ours.tensors[TEXT], theirs_.tensors[TEXT])


@torch.inference_mode()
def test_a_model_that_is_let_go_of_leaves_its_positions_in_no_cache(folder: Path) -> None:
    model = load(folder)
    inputs = model.inputs([PROMPT], WIDTH, HEIGHT)
    model.evaluate(start_noise(5, SHAPE)[None], torch.ones(1), inputs)
    positions = weakref.ref(model.modules()["transformer"].pos_embed)
    assert positions() is not None
    del model
    gc.collect()
    assert positions() is None


def test_relatives_and_edits_of_attention_are_refused(
    model: HostedModel, folder: Path, tmp_path: Path
) -> None:
    reason = model.refuses(IdentityAttention(("transformer_blocks.0",))) or ""
    assert "QwenImageTransformer2DModel, whose attention cannot be edited" in reason
    copy = copied(folder, tmp_path)
    file = copy / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_layer3d_rope": True}))
    with pytest.raises(ModelMismatch, match="has use_layer3d_rope true; Qwen-Image has false"):
        load(copy)


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "qwen"))

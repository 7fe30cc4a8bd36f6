"""FLUX.1 is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.pipelines.flux import pipeline_flux_img2img
from torch import Tensor

from samplers import FittedSampler
from samplers.registry import SAMPLERS
from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.errors import InvalidRequest, ModelMismatch
from server.models.distilled import stated
from server.models.flux1 import POOLED, TEXT, packed
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.models.alike import assert_among, assert_apart, assert_skipped, task_of
from tests.server.models.tiny_flux1 import DEV, SCHNELL, make
from tests.server.models.tiny_sdxl import saved
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run

PROMPT = "a red circle"
WIDTH, HEIGHT = 32, 24
SHAPE = (4, HEIGHT // 2, WIDTH // 2)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(DEV, guided=True)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(pipeline, tmp_path_factory.mktemp("models") / "dev")


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path, dtype: str = "float32") -> HostedModel:
    return load_model(folder, name="flux", device="cpu", dtype=dtype)


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
    """Final latents of their pipeline, from the same x as ours."""
    noise = start_noise(seed, SHAPE)[None]
    given = {
        "prompt": PROMPT,
        "latents": pipeline._pack_latents(noise, *noise.shape),
        "num_inference_steps": steps,
        "width": WIDTH,
        "height": HEIGHT,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
        **fields,
    }
    return pipeline._unpack_latents(pipeline(**given).images, HEIGHT, WIDTH, 2)[0]


def test_a_bare_request_is_drawn_as_diffusers_draws_it(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model, steps=None)])
    assert_among(decoded, theirs(pipeline, steps=28, guidance_scale=3.5))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    told: dict[str, Any] = {"name": "cfg", "policy": "embedded"}
    company: list[dict[str, Any]] = [
        {},
        {"prompt": "a star", "guidance": told | {"scale": 2.0}, "seed": 6},
        {"negative_prompt": "blue", "guidance": {"name": "cfg", "scale": 4.0}, "seed": 7},
        {"guidance": "none", "steps": 3, "seed": 8},
        {"sampler": "dpm_solver_pp", "guidance": "apg", "steps": 3, "seed": 9},
        {"sampler": "heun", "spacing": "karras", "seed": 10},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline, guidance_scale=3.5))
    assert_among(decoded, theirs(pipeline, 6, prompt="a star", guidance_scale=2.0))
    assert_apart(theirs(pipeline, guidance_scale=3.5), theirs(pipeline, guidance_scale=1.0))
    true_cfg: dict[str, Any] = {"guidance_scale": 1.0, "true_cfg_scale": 4.0}
    assert_among(decoded, theirs(pipeline, 7, negative_prompt="blue", **true_cfg))
    assert_among(decoded, theirs(pipeline, 8, steps=3, guidance_scale=1.0))


def test_every_sampler_runs_with_its_own_spacing(model: HostedModel, engine: Engine) -> None:
    # Samplers fitted to a model would have to be fitted first.
    kinds = [kind for kind in SAMPLERS if not issubclass(kind, FittedSampler)]
    names = [kind.model_fields["name"].default for kind in kinds]
    tasks = [asked(model, sampler=name, seed=seed) for seed, name in enumerate(names)]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    # Samplers for distilled models get the times of continuous ones.
    assert tasks[names.index("lcm")].plan.t[0] == 1


@torch.inference_mode()
def test_a_picture_is_drawn_anew_as_diffusers_draws_it(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = torch.rand(3, HEIGHT, WIDTH) * 2 - 1
    latents = model.encode_image(picture[None])
    mean = pipeline.vae.encode(picture[None]).latent_dist.mode()
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    run(engine, [asked(model, image=picture, strength=0.6)])
    monkeypatch.setattr(
        pipeline_flux_img2img, "randn_tensor", lambda *_, **__: start_noise(5, SHAPE)[None]
    )
    anew: Any = FluxImg2ImgPipeline(**pipeline.components)
    anew.set_progress_bar_config(disable=True)
    # With as many channels as latents, it is taken for latents.
    given = {"image": latents, "strength": 0.6, "num_inference_steps": 4, "guidance_scale": 3.5}
    same = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": LENGTH}
    packed_ones = anew(PROMPT, output_type="latent", **given, **same).images
    assert_among(decoded, pipeline._unpack_latents(packed_ones, HEIGHT, WIDTH, 2)[0])


@torch.inference_mode()
def test_in_bfloat16_the_thousandfold_of_sigma_is_rounded_as_by_diffusers(folder: Path) -> None:
    half = load(folder, "bfloat16")
    network = half.modules()["transformer"]
    told: list[float] = []
    network.get_submodule("time_text_embed").register_forward_pre_hook(
        lambda _, args: told.append(float(args[0][0]))
    )
    half.evaluate(torch.zeros(1, *SHAPE), torch.tensor([857.7]), half.inputs([PROMPT]))
    # Rounding sigma itself would have given 860.
    assert told == [856.0]


@torch.inference_mode()
def test_t5_reads_its_padding_and_the_padding_is_kept(pipeline: Any, model: HostedModel) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    expected, pooled, _ = pipeline.encode_prompt(PROMPT, max_sequence_length=LENGTH)
    torch.testing.assert_close(ours.tensors[TEXT], expected[0])
    torch.testing.assert_close(ours.tensors[POOLED], pooled[0])
    tokens = pipeline.tokenizer_2(PROMPT, padding="max_length", return_tensors="pt")
    masked = pipeline.text_encoder_2(**tokens).last_hidden_state[0]
    own = int(tokens.attention_mask.sum())
    assert own < LENGTH
    assert_apart(ours.tensors[TEXT][:own], masked[:own])


def test_latents_are_packed_in_the_order_of_channel_row_column(pipeline: Any) -> None:
    latents = torch.randn(1, *SHAPE)
    torch.testing.assert_close(packed(latents), pipeline._pack_latents(latents, 1, *SHAPE))


def test_schnell_follows_its_own_convention(tmp_path: Path) -> None:
    schnell = make(SCHNELL, guided=False)
    hosted = load(saved(schnell, tmp_path / "schnell"))
    own = hosted.facts.defaults
    assert own is not None
    assert own.convention == "flux_schnell"
    task = asked(hosted, steps=None)
    assert task.plan.t.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("scheduler", "guided", "tokens"), [(DEV, True, 511), (DEV, False, 511), (SCHNELL, False, 255)]
)
def test_only_schnell_reads_short_prompts(
    scheduler: dict[str, Any], guided: bool, tokens: int, tmp_path: Path
) -> None:
    pipeline = make(scheduler, guided=guided)
    pipeline.tokenizer_2.model_max_length = 512
    assert load(saved(pipeline, tmp_path / "flux")).facts.max_tokens == tokens


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_blocks_of_both_kinds_can_be_skipped(model: HostedModel, blocks: str) -> None:
    assert_skipped(model, start_noise(0, SHAPE), PROMPT, blocks)


def test_an_operator_may_state_a_convention_of_flow_matching_models_alone(tmp_path: Path) -> None:
    file = tmp_path / "weft/defaults.json"
    file.parent.mkdir()
    file.write_text('{"convention": "flux_dev", "steps": 8}')
    own = stated(tmp_path, {}, embeds_scale=True, flow=True)
    assert own is not None
    assert (own.steps, own.policy.name) == (8, "embedded")
    with pytest.raises(
        ModelMismatch, match="guidance scale as an input; this one has no guidance_embeds"
    ):
        stated(tmp_path, {}, embeds_scale=False, flow=True)
    file.write_text('{"convention": "lcm_lora"}')
    with pytest.raises(ModelMismatch, match="models that predict noise; this one matches a flow"):
        stated(tmp_path, {}, embeds_scale=True, flow=True)


def test_a_transformer_that_reads_more_than_the_latents_is_refused(tmp_path: Path) -> None:
    fill = saved(make(DEV, guided=True, channels=32), tmp_path / "fill")
    with pytest.raises(ModelMismatch, match="takes latents of 8 channels; its autoencoder makes l"):
        load(fill)


def test_attention_cannot_be_edited_which_is_said_in_one_sentence(model: HostedModel) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^guidance.perturbed\S*: model 'flux' has a FluxTransf"
    ):
        asked(model, guidance={"name": "cfg", "perturbed": ["pag"]})

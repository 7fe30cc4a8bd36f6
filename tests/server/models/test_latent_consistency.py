"""A latent consistency model is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UNet2DConditionModel,
)
from diffusers.schedulers import scheduling_lcm
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from embedded import MODEL_FOLDER
from server.engine.engine import Engine
from server.engine.state.noise import stage_noise, start_noise
from server.engine.task import ImageTask
from server.errors import ModelMismatch
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.models.tiny_sdxl import VAE, text_config
from tests.server.toy_model import run

PROMPT = "a large red circle"
SHAPE = (4, 32, 32)
BARE = {
    "sampler": {"name": "lcm"},
    "spacing": {"name": "lcm", "distilled_steps": 50},
    "steps": 4,
    "guidance": {"name": "cfg", "scale": 8.5, "policy": {"name": "embedded"}},
}
"""What a request with only a prompt gets, as in diffusers' pipeline."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    without: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    made = LatentConsistencyModelPipeline(
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=32,
            time_cond_proj_dim=32,
        ).eval(),
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=CLIPTextModel(text_config(32)).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer"),
        # As in the published configs; the last step still ends at the clean picture.
        scheduler=LCMScheduler(set_alpha_to_one=False, steps_offset=1),
        **without,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "lcm"
    pipeline.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="lcm", device="cpu", dtype="float32")


def resolved(model: HostedModel, **fields: Any) -> ResolvedRequest:
    request = GenerateRequest.model_validate({"prompt": PROMPT, "seed": 5, **fields})
    return resolve(request, model, Limits(), None)


def asked(model: HostedModel, **fields: Any) -> ImageTask:
    request = resolved(model, **fields)
    layout = request.sampler, request.spacing, request.steps, request.strength
    plan = make_plan(model.default_schedule, *layout)
    prepared = prepare(request, model, plan)
    [task] = tasks_of(prepared, model)
    return task


@torch.inference_mode()
def theirs(
    pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
    seed: int = 5,
    prompt: str = PROMPT,
    **fields: Any,
) -> Tensor:
    """Final latents of their pipeline at its defaults, from the same x and stage noise as ours."""
    stages = iter(range(50))
    monkeypatch.setattr(
        scheduling_lcm,
        "randn_tensor",
        lambda *_, **__: stage_noise(seed, next(stages), SHAPE)[None],
    )
    latents = start_noise(seed, SHAPE)[None]
    return pipeline(prompt, latents=latents, output_type="latent", **fields).images[0]


def assert_among(seen: list[Tensor], expected: Tensor) -> None:
    errors = [float((one - expected).norm() / expected.norm()) for one in seen]
    assert min(errors) < 1e-4, errors


def test_a_bare_request_runs_as_the_pipeline_does(model: HostedModel) -> None:
    settings = resolved(model).settings()
    assert_part(settings, BARE)


def test_one_that_was_saved_as_stable_diffusion_is_told_by_its_scheduler_and_its_unet(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "lcm"))
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    assert_part(resolved(load(copy)).settings(), BARE)


def test_final_latents_of_a_bare_request_are_those_of_diffusers(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [result] = run(engine, [asked(model)]).results.values()
    assert result.evaluations == 4
    assert_among(decoded, theirs(pipeline, monkeypatch))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"guidance": {"name": "cfg", "scale": 2.0, "policy": "embedded"}, "seed": 6},
        {"steps": 5, "prompt": "a green star", "seed": 7},
        {"guidance": "none", "seed": 8},
        {"sampler": "dpm_solver_pp", "guidance": "apg", "seed": 9},
        {"guidance": {"name": "cfg", "policy": "embedded", "nag": {}}, "seed": 10},
        {"sampler": "tcd", "steps": 2, "seed": 11},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    same: list[dict[str, Any]] = [
        {},
        {"seed": 6, "guidance_scale": 2.0},
        {"seed": 7, "prompt": "a green star", "num_inference_steps": 5},
        {"seed": 8, "guidance_scale": 1.0},
    ]
    for fields in same:
        assert_among(decoded, theirs(pipeline, monkeypatch, **fields))


@pytest.mark.parametrize(
    ("fields", "gets"),
    [
        ({"steps": 25}, {**BARE, "steps": 25}),
        ({"sampler": "lcm"}, BARE),
        ({"guidance": "none"}, {**BARE, "guidance": {"name": "none", "policy": "always"}}),
        (
            {"sampler": "dpm_solver_pp"},
            {**BARE, "sampler": "dpm_solver_pp", "spacing": {"name": "trailing"}},
        ),
        ({"spacing": "trailing"}, {**BARE, "spacing": {"name": "trailing"}}),
        (
            {"spacing": {"name": "custom", "times": [999, 500]}},
            {**BARE, "steps": 2, "spacing": {"name": "custom"}},
        ),
    ],
    ids=lambda value: "-".join(value) if len(value) == 1 else "",
)
def test_what_is_named_keeps_sensible_company(
    model: HostedModel, fields: dict[str, Any], gets: dict[str, Any]
) -> None:
    assert_part(resolved(model, **fields).settings(), gets)


def assert_part(whole: Any, part: Any) -> None:
    if isinstance(part, str) and isinstance(whole, dict):
        part = {"name": part}
    if not isinstance(part, dict):
        assert whole == part
        return
    for key, value in part.items():
        assert_part(whole[key], value)


def test_the_times_are_those_that_the_model_was_distilled_at(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "lcm"))
    edit(copy / "scheduler" / "scheduler_config.json", original_inference_steps=40)
    model = load(copy)
    for sampler in ("lcm", "tcd"):
        request = resolved(model, sampler=sampler, steps=3)
        plan = make_plan(model.default_schedule, request.sampler, request.spacing, 3, None)
        pipeline.scheduler.set_timesteps(3, original_inference_steps=40)
        assert plan.t[:-1].tolist() == pipeline.scheduler.timesteps.tolist()


def test_a_scheduler_config_may_leave_the_distilled_steps_out(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "lcm"))
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["original_inference_steps"]
    file.write_text(json.dumps(config))
    assert resolved(load(copy)).settings()["spacing"] == BARE["spacing"]


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DDIMScheduler"]},
            "names 'DDIMScheduler' as its scheduler; allowed are LCMScheduler",
        ),
        ("unet/config.json", {"time_cond_proj_dim": None}, "has no time_cond_proj_dim"),
        (
            "scheduler/scheduler_config.json",
            {"clip_sample": True},
            "has the clip_sample 'True'; allowed is False",
        ),
        (
            "scheduler/scheduler_config.json",
            {"timestep_scaling": 8.0},
            "has the timestep_scaling '8.0'; allowed is 10.0",
        ),
        (
            "scheduler/scheduler_config.json",
            {"original_inference_steps": 0},
            "has the original_inference_steps '0'; a whole number from 1 to 1000",
        ),
    ],
    ids=["scheduler", "scale", "clipped", "boundary", "distilled"],
)
def test_what_the_sampler_could_not_follow_is_refused(
    folder: Path, tmp_path: Path, file: str, fields: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "lcm"))
    edit(copy / file, **fields)
    with pytest.raises(ModelMismatch, match=says):
        load(copy)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

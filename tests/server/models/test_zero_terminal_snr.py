"""Models of zero terminal SNR draw as in diffusers' own pipelines with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.tiny_sd import make
from tests.server.models.tiny_sdxl import BETAS, saved
from tests.server.toy_model import run

PROMPT = "a large red circle"
SHAPE = (4, 24, 32)
STEPS = 4
ZERO_SNR: dict[str, Any] = {
    **BETAS,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
SCHEDULERS: dict[str, Any] = {
    # With alpha exactly 0 at the first step, and with sigma 4096.
    "ddim": DDIMScheduler(**ZERO_SNR, clip_sample=False),
    "euler": EulerDiscreteScheduler(**ZERO_SNR),
}


@pytest.fixture(scope="module", params=SCHEDULERS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return make(SCHEDULERS[request.param])


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = saved(pipeline, tmp_path_factory.mktemp("models") / "zero")
    return load_model(folder, name="zero", device="cpu", dtype="float32")


@torch.inference_mode()
def theirs(pipeline: Any, seed: int, **fields: Any) -> Tensor:
    answer = pipeline(
        PROMPT,
        width=64,
        height=48,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        latents=start_noise(seed, SHAPE)[None],
        output_type="latent",
        **fields,
    )
    return answer.images[0]


def test_final_latents_alone_and_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    sampler = "ddim" if isinstance(pipeline.scheduler, DDIMScheduler) else "euler"
    usual: dict[str, Any] = {
        "prompt": PROMPT,
        "width": 64,
        "height": 48,
        "steps": STEPS,
        "seed": 5,
        "sampler": sampler,
        "spacing": "trailing",
        "guidance": {"name": "cfg", "scale": 7.5},
    }
    run(engine, [task_of(model, **usual)])
    expected = theirs(pipeline, 5)
    assert_among(decoded, expected)
    assert_apart(expected, theirs(pipeline, 5, guidance_rescale=0.7))
    decoded.clear()
    rescaled = {"name": "cfg_rescale", "scale": 7.5, "rescale": 0.7}
    company: list[dict[str, Any]] = [
        {},
        {"seed": 6, "guidance": rescaled},
        {"seed": 7, "sampler": "heun", "guidance": "none"},
        {"seed": 8, "sampler": "unipc", "spacing": "karras", "guidance": "cfg_plus_plus"},
        {"seed": 9, "sampler": "lcm", "spacing": "lcm"},
    ]
    ear = run(engine, [task_of(model, **usual | fields) for fields in company])
    assert not ear.errors, ear.errors
    assert all(latents.isfinite().all() for latents in decoded)
    assert_among(decoded, expected)
    assert_among(decoded, theirs(pipeline, 6, guidance_rescale=0.7))


def test_samplers_that_overshoot_from_sigma_4096_in_few_steps_say_so(
    pipeline: Any, model: HostedModel
) -> None:
    begins_at_4096 = isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    for sampler, steps, overshoots in (
        ("heun", 10, True),
        ("heun", 20, False),
        ("euler", 4, False),
    ):
        request = GenerateRequest.model_validate(
            {"prompt": PROMPT, "sampler": sampler, "spacing": "trailing", "steps": steps}
        )
        resolved = resolve(request, model, Limits(), None)
        schedule = model.schedule(resolved.width, resolved.height, steps)
        plan = make_plan(schedule, resolved.sampler, resolved.spacing, steps, None)
        warnings = " ".join(prepare(resolved, model, plan).warnings)
        said = "overshoots in fewer than 20 steps on model 'zero', which begins at sigma 4096"
        assert (said in warnings) == (overshoots and begins_at_4096)


def test_a_bare_request_starts_from_noise_alone_and_rescales_its_guidance(
    model: HostedModel,
) -> None:
    settings = resolve(GenerateRequest(prompt=PROMPT), model, Limits(), None).settings()
    chosen = [settings[field]["name"] for field in ("sampler", "spacing", "guidance")]
    assert chosen == ["ddim", "trailing", "cfg_rescale"]
    assert (settings["steps"], settings["guidance"]["rescale"]) == (25, 0.7)

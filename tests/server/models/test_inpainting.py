"""Inpainting U-Nets repaint what diffusers' own pipelines repaint with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.requests.upload import Upload
from server.settings import Limits
from tests.server.models import tiny_sd
from tests.server.models.alike import as_diffusers, assert_among, assert_apart
from tests.server.models.tiny_sdxl import BASE, make
from tests.server.toy_model import run

PROMPT = "a large red circle"
WIDTH, HEIGHT = 64, 48
STEPS = 4
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
PICTURE = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
# Edges inside cells, and greys above and below the middle.
MASK = torch.zeros(HEIGHT, WIDTH)
MASK[7:30, 11:40] = 1
MASK[30:36, 11:40] = 0.6
MASK[7:30, 40:47] = 0.4


def made(family: str) -> Any:
    if family == "sd":
        pipeline = tiny_sd.make(BASE, StableDiffusionInpaintPipeline, in_channels=9)
    else:
        parts: dict[str, Any] = dict(make(BASE, in_channels=9).components)
        pipeline = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["sd", "xl"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = tmp_path_factory.mktemp("models") / "inpainting"
    pipeline.save_pretrained(folder)
    return load_model(Path(folder), name="inpainting", device="cpu", dtype="float32")


def asked(
    model: HostedModel, picture: Tensor | None = None, mask: Tensor | None = None, **fields: Any
) -> ImageTask:
    body = as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS) | fields
    size = None if picture is None else (WIDTH, HEIGHT)
    sent = (("image", picture), ("mask", mask))
    given = {name: Upload("") for name, one in sent if one is not None}
    request = GenerateRequest.model_validate(body | given)
    resolved = resolve(request, model, Limits(), size)
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    prepared = prepare(resolved, model, make_plan(schedule, *layout))
    [task] = tasks_of(prepared, model, image=picture, mask=mask)
    return task


@torch.inference_mode()
def theirs(
    pipeline: Any, picture: Tensor, mask: Tensor, *, strength: float = 1.0, **fields: Any
) -> Tensor:
    """Final latents of their pipeline, from the same x, around the mean of the posterior."""
    pipeline.scheduler.set_timesteps(STEPS)
    noise, scheduler = start_noise(fields.pop("seed", 5), SHAPE)[None], pipeline.scheduler
    start = scheduler.sigmas[int(STEPS * (1 - strength))]
    kept = picture[None] * (mask < 0.5)
    encoded, around = (
        pipeline.vae.encode(one).latent_dist.mode() * pipeline.vae.config.scaling_factor
        for one in (picture[None], kept)
    )
    latents = (noise * (1 + start**2) ** 0.5) if strength == 1 else encoded + start * noise
    given = {"guidance_scale": 5.0, "width": WIDTH, "height": HEIGHT, **fields}
    answer = pipeline(
        PROMPT,
        image=picture[None] / 2 + 0.5,
        mask_image=mask[None, None],
        masked_image_latents=around,
        strength=strength,
        num_inference_steps=STEPS,
        latents=latents / float(scheduler.init_noise_sigma),
        output_type="latent",
        **given,
    )
    return answer.images[0]


def test_a_part_is_repainted_in_mixed_company_as_diffusers_repaints_it(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    other = MASK.flip(0, 1)
    tasks = [
        asked(model, PICTURE, MASK),
        asked(model, -PICTURE, other, seed=6, guidance="none"),
        asked(model, PICTURE, MASK, seed=7, strength=0.5, negative_prompt=""),
        asked(model, seed=8),
        asked(model, PICTURE, MASK, seed=9, sampler="heun", guidance="apg", steps=3),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    grey, everything = torch.zeros_like(PICTURE), torch.ones_like(MASK)
    assert_among(decoded, theirs(pipeline, PICTURE, MASK))
    assert_among(decoded, theirs(pipeline, -PICTURE, other, seed=6, guidance_scale=1.0))
    halved: dict[str, Any] = {"seed": 7, "strength": 0.5, "negative_prompt": ""}
    assert_among(decoded, theirs(pipeline, PICTURE, MASK, **halved))
    assert_among(decoded, theirs(pipeline, grey, everything, seed=8))


def test_a_part_is_repainted_alone_as_diffusers_repaints_it(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model, PICTURE, MASK)])
    assert_among(decoded, theirs(pipeline, PICTURE, MASK))
    # The picture, the mask and the mask's threshold all make a difference.
    for sprung in (theirs(pipeline, -PICTURE, MASK), theirs(pipeline, PICTURE, MASK.ceil())):
        assert_apart(decoded[0], sprung)


def test_the_picture_is_encoded_once_for_all_images_of_a_request(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    channels = model.channels
    monkeypatch.setattr(model, "channels", lambda *of: calls.append(of) or channels(*of))
    run(engine, [asked(model, PICTURE, MASK, seed=seed) for seed in (1, 2, 3)])
    assert len(calls) == 1


@torch.inference_mode()
def test_rows_that_are_shown_nothing_repaint_everything(model: HostedModel) -> None:
    inputs, x, t = model.inputs([PROMPT], WIDTH, HEIGHT), torch.randn(1, *SHAPE), torch.ones(1)
    channels = model.channels(None, None, WIDTH, HEIGHT)
    assert channels is not None
    assert channels[0].min() == 1
    told = model.evaluate(x, t, type(inputs)(inputs.conditioning, channels=channels[None]))
    assert torch.equal(model.evaluate(x, t, inputs), told)

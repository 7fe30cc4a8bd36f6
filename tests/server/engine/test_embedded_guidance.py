"""Guidance inside a distilled network, against diffusers' own pipeline on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

from embedded import MODEL_FOLDER
from guidance.cfg import CFG
from guidance.embedded import Embedded
from guidance.pag import PAG
from samplers.lcm import LCM
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.by_hand import terms_for
from tests.server.toy_model import run, started

PROMPT, SEED, STEPS = "a red circle", 11, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a small random network that takes a guidance scale as input."""
    made = tmp_path_factory.mktemp("lcm") / "model"
    left_out = shutil.ignore_patterns("unet", "weft")
    shutil.copytree(MODEL_FOLDER, made, ignore=left_out)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=128,
        time_cond_proj_dim=32,
    )
    unet.save_pretrained(made / "unet")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load_model(folder, name="lcm", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def published(folder: Path) -> Callable[[float], np.ndarray]:
    """Pixels that diffusers draws at a guidance scale."""
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    parts["scheduler"] = LCMScheduler.from_config(config)
    pipeline: Any = LatentConsistencyModelPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)

    def draw(scale: float) -> np.ndarray:
        answer = pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        )
        return (answer.images[0] * 255).round()

    return draw


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch, model: HostedModel) -> None:
    """Fresh noise as diffusers draws it: from one generator, after the start noise."""
    shape = model.latent_shape(128, 128)
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(shape, generator=generator) for _ in range(STEPS + 1)][1:]
    monkeypatch.setattr("server.engine.tick.weave.stage_noise", lambda _, stage, __: drawn[stage])


@pytest.mark.usefixtures("same_noise")
def test_pictures_are_those_of_the_latent_consistency_pipeline(
    model: HostedModel, published: Callable[[float], np.ndarray]
) -> None:
    """Images of different scales share their forwards with one that has no scale."""
    plan = LCM().plan(model.default_schedule.grid("lcm", STEPS))
    scales = [8.5, 1.0, 4.0]

    def task(scale: float, **fields: Any) -> ImageTask:
        return ImageTask(
            model="lcm",
            prompt=PROMPT,
            negative_prompt="blue",
            width=128,
            height=128,
            seed=SEED,
            plan=plan,
            rule=CFG(scale=scale),
            policy=Embedded(),
            **fields,
        )

    engine = started(model, 8)
    try:
        ear = run(
            engine,
            [*map(task, scales), task(4.0, terms=terms_for((PAG(),), plan, model, prompt=PROMPT))],
        )
    finally:
        engine.stop(0)
    for k, scale in enumerate(scales):
        assert np.abs(ear.results[k].pixels - published(scale)).max() <= 2
        assert ear.results[k].evaluations == STEPS
    assert not np.array_equal(ear.results[0].pixels, ear.results[2].pixels)
    assert ear.results[3].evaluations == 2 * STEPS

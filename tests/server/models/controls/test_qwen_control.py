"""Images of Qwen-Image with ControlNets are those of diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import (
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
)
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.models import transformer_model
from server.models.controls.control import ControlUse
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.controls.tiny_controls import (
    encoding_to_the_mean,
    saved,
    shelf_of,
    use,
    with_an_effect,
)
from tests.server.models.tiny_qwen_image import CHANNELS, make
from tests.server.toy_model import run

PROMPT = "a red circle"
SIZE = WIDTH, HEIGHT = 32, 48


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make()


@pytest.fixture(scope="module")
def network(pipeline: Any) -> Any:
    torch.manual_seed(1)
    config: dict[str, Any] = dict(pipeline.transformer.config)
    return with_an_effect(QwenImageControlNetModel.from_config({**config, "num_layers": 1}))


@pytest.fixture(scope="module")
def model(pipeline: Any, network: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder: Path = tmp_path_factory.mktemp("qwen")
    pipeline.save_pretrained(folder / "model")
    saved(network, folder / "controls", "union")
    # No config of this family states a size, and 1024 pixels are too many for a test.
    with patch.object(transformer_model, "DEFAULT_SIDE", 48):
        model = load_model(folder / "model", name="qwen", device="cpu", dtype="float32")
    model.controls = shelf_of(model, folder / "controls")
    return model


@torch.inference_mode()
def theirs(pipeline: Any, network: Any, *uses: ControlUse, seed: int = 5, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    alone = len(uses) == 1
    made: Any = QwenImageControlNetPipeline(
        **pipeline.components,
        controlnet=network if alone else QwenImageMultiControlNetModel([network]),
    )
    made.set_progress_bar_config(disable=True)
    scale = made.vae_scale_factor
    noise = start_noise(seed, (CHANNELS, HEIGHT // scale, WIDTH // scale))[None]
    pictures, scales = [one.picture[None] for one in uses], [one.scale for one in uses]
    given: dict[str, Any] = {"negative_prompt": " ", "true_cfg_scale": 4.0, **fields}
    with encoding_to_the_mean():
        tokens = made(
            **{"prompt": PROMPT, **given},
            latents=made._pack_latents(noise, *noise.shape),
            num_inference_steps=3,
            width=WIDTH,
            height=HEIGHT,
            control_image=pictures[0] if alone else pictures,
            controlnet_conditioning_scale=scales[0] if alone else scales,
            control_guidance_start=[one.start for one in uses],
            control_guidance_end=[one.end for one in uses],
            output_type="latent",
        ).images
    return made._unpack_latents(tokens, HEIGHT, WIDTH, scale)[0, :, 0]


def asked(model: HostedModel, *uses: ControlUse, **fields: Any) -> Any:
    usual: dict[str, Any] = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "steps": 3}
    body: dict[str, Any] = {**usual, "seed": 5, **fields}
    return replace(task_of(model, **body), controls=uses)


def test_images_alone_and_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, network: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """Prompts of several lengths; the negative prompt gets the residuals of the prompt."""
    union, late = use(model, "union", 1, SIZE), use(model, "union", 2, SIZE, start=0.3, scale=0.5)
    expected = theirs(pipeline, network, union)
    run(engine, [asked(model, union)])
    assert_among(decoded, expected)
    decoded.clear()
    long = "a large red circle to the left of a small green star"
    tasks = [
        asked(model, union),
        asked(model, seed=6),
        asked(model, late, seed=7, prompt=long, negative_prompt="blue"),
        asked(model, union, late, seed=8),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert_among(decoded, expected)
    assert_among(decoded, theirs(pipeline, network, replace(union, scale=0.0), seed=6))
    other: dict[str, Any] = {"prompt": long, "negative_prompt": "blue"}
    assert_among(decoded, theirs(pipeline, network, late, seed=7, **other))
    assert_among(decoded, theirs(pipeline, network, union, late, seed=8))
    assert_apart(expected, theirs(pipeline, network, use(model, "union", 2, SIZE)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, None),
        ({"extra_condition_channels": 4}, "has extra_condition_channels 4, where 0 is needed"),
        ({"num_layers": 3}, "has num_layers 3, where 1 to 2 are possible"),
    ],
)
def test_the_controlnets_of_qwen_image_have_its_size(
    pipeline: Any, model: HostedModel, config: dict[str, Any], says: str | None
) -> None:
    assert model.control_kind is not None
    found = model.control_kind.misfit({**pipeline.transformer.config, **config})
    assert found is None if says is None else found is not None and found.startswith(says)

"""Images of Stable Diffusion 3 with ControlNets are those of diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
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
from tests.server.models.tiny_sd3 import make
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run

PROMPT = "a red circle"
SIZE = WIDTH, HEIGHT = 32, 24
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
KINDS: dict[str, dict[str, Any]] = {
    "instantx": {"num_layers": 2, "force_zeros_for_pooled_projection": True},
    "second": {"num_layers": 2, "force_zeros_for_pooled_projection": True},
    "official": {
        "num_layers": 1,
        "force_zeros_for_pooled_projection": False,
        "joint_attention_dim": None,
        "use_pos_embed": False,
        "qk_norm": None,
        "dual_attention_layers": (),
    },
}
"""Those of Stability AI for SD 3.5 read no text, and have the positions of the transformer."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make()


@pytest.fixture(scope="module")
def networks(pipeline: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    config: dict[str, Any] = dict(pipeline.transformer.config)
    return {
        name: with_an_effect(SD3ControlNetModel(**{**config, **own})) for name, own in KINDS.items()
    }


@pytest.fixture(scope="module")
def model(
    pipeline: Any, networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> HostedModel:
    folder: Path = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder / "model")
    for name, network in networks.items():
        saved(network, folder / "controls", name)
    model = load_model(folder / "model", name="sd3", device="cpu", dtype="float32")
    model.controls = shelf_of(model, folder / "controls")
    return model


@torch.inference_mode()
def theirs(
    pipeline: Any, networks: dict[str, Any], *uses: ControlUse, seed: int = 5, **fields: Any
) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    own = [networks[one.control.name] for one in uses]
    alone = len(own) == 1
    made: Any = StableDiffusion3ControlNetPipeline(
        **pipeline.components, controlnet=own[0] if alone else SD3MultiControlNetModel(own)
    )
    made.set_progress_bar_config(disable=True)
    # Tensors are taken unchanged; pictures from files are scaled to [-1, 1].
    pictures, scales = [one.picture[None] for one in uses], [one.scale for one in uses]
    given: dict[str, Any] = {"guidance_scale": 4.0, **fields}
    with encoding_to_the_mean():
        return made(
            PROMPT,
            latents=start_noise(seed, SHAPE)[None],
            num_inference_steps=4,
            width=WIDTH,
            height=HEIGHT,
            control_image=pictures[0] if alone else pictures,
            controlnet_conditioning_scale=scales[0] if alone else scales,
            control_guidance_start=[one.start for one in uses],
            control_guidance_end=[one.end for one in uses],
            max_sequence_length=LENGTH,
            output_type="latent",
            **given,
        ).images[0]


def asked(model: HostedModel, *uses: ControlUse, **fields: Any) -> Any:
    usual: dict[str, Any] = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "steps": 4}
    guided: dict[str, Any] = {"seed": 5, "guidance": {"name": "cfg", "scale": 4.0}}
    body: dict[str, Any] = {**usual, **guided, **fields}
    return replace(task_of(model, **body), controls=uses)


def test_images_alone_and_in_mixed_company_are_those_of_diffusers(
    pipeline: Any,
    networks: dict[str, Any],
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
) -> None:
    instantx, official = use(model, "instantx", 1, SIZE), use(model, "official", 2, SIZE)
    late = use(model, "second", 3, SIZE, scale=0.5, start=0.3)
    expected = theirs(pipeline, networks, instantx)
    ear = run(engine, [asked(model, instantx)])
    assert not ear.errors, ear.errors
    assert_among(decoded, expected)
    decoded.clear()
    tasks = [
        asked(model, instantx),
        asked(model, seed=6),
        asked(model, official, seed=7),
        asked(model, instantx, late, seed=8),
        asked(model, instantx, official, seed=9, sampler="heun", guidance="none", steps=3),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert_among(decoded, expected)
    assert_among(decoded, theirs(pipeline, networks, replace(instantx, scale=0.0), seed=6))
    assert_among(decoded, theirs(pipeline, networks, official, seed=7))
    assert_among(decoded, theirs(pipeline, networks, instantx, late, seed=8))
    assert_apart(expected, theirs(pipeline, networks, use(model, "instantx", 2, SIZE)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, None),
        ({"joint_attention_dim": None}, None),
        ({"joint_attention_dim": 7}, "has joint_attention_dim 7, where"),
        ({"extra_conditioning_channels": 1}, "has extra_conditioning_channels 1, where 0 is"),
        ({"num_layers": 4}, "has num_layers 4, where 1 to 3 are possible"),
    ],
)
def test_the_controlnets_of_stable_diffusion_3_have_its_size(
    pipeline: Any, model: HostedModel, config: dict[str, Any], says: str | None
) -> None:
    assert model.control_kind is not None
    found = model.control_kind.misfit({**pipeline.transformer.config, **config})
    assert found is None if says is None else found is not None and found.startswith(says)

"""Images of FLUX.1 with ControlNets are those of diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxTransformer2DModel,
)
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.models.controls.control import ControlUse
from server.models.given_denoiser import with_denoiser
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
from tests.server.models.gguf.files import restored, write
from tests.server.models.tiny_flux1 import DEV, VAE, make
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run, started

# A warning of diffusers' about a class that its own ControlNet imports.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")

PROMPT = "a red circle"
SIZE = WIDTH, HEIGHT = 32, 24
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
LAYERS: dict[str, dict[str, int]] = {
    "edges": {"num_layers": 2, "num_single_layers": 1},
    "depth": {"num_layers": 2, "num_single_layers": 1},
    "few": {"num_layers": 1, "num_single_layers": 0},
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = make(DEV, guided=True)
    torch.manual_seed(0)
    config: dict[str, Any] = {**made.transformer.config, "num_layers": 3, "num_single_layers": 2}
    made.transformer = FluxTransformer2DModel(**config).eval()
    return made


@pytest.fixture(scope="module")
def networks(pipeline: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    config: dict[str, Any] = dict(pipeline.transformer.config)
    return {name: network(config, **own) for name, own in LAYERS.items()}


def network(config: dict[str, Any], **own: Any) -> Any:
    """A ControlNet with a transformer's config, and further entries."""
    left_out = "out_channels"
    taken = {name: value for name, value in config.items() if name != left_out}
    return with_an_effect(FluxControlNetModel(**{**taken, **own}))


@pytest.fixture(scope="module")
def model(
    pipeline: Any, networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> HostedModel:
    return hosted(pipeline, networks, tmp_path_factory.mktemp("flux"))


def hosted(pipeline: Any, networks: dict[str, Any], folder: Path) -> HostedModel:
    pipeline.save_pretrained(folder / "model")
    for name, one in networks.items():
        saved(one, folder / "controls", name)
    model = load_model(folder / "model", name="flux", device="cpu", dtype="float32")
    model.controls = shelf_of(model, folder / "controls")
    return model


@torch.inference_mode()
def theirs(
    pipeline: Any, networks: dict[str, Any], *uses: ControlUse, seed: int = 5, **fields: Any
) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    own = [networks[one.control.name] for one in uses]
    alone = len(own) == 1
    made: Any = FluxControlNetPipeline(
        **pipeline.components, controlnet=own[0] if alone else FluxMultiControlNetModel(own)
    )
    made.set_progress_bar_config(disable=True)
    channels, scale = made.vae.config.latent_channels, made.vae_scale_factor
    width, height = uses[0].picture.shape[2], uses[0].picture.shape[1]
    noise = start_noise(seed, (channels, height // scale, width // scale))[None]
    # Tensors are taken unchanged; pictures from files are scaled to [-1, 1].
    pictures = [one.picture[None] for one in uses]
    scales = [one.scale for one in uses]
    given: dict[str, Any] = {"guidance_scale": 3.5, **fields}
    with encoding_to_the_mean():
        tokens = made(
            PROMPT,
            latents=made._pack_latents(noise, *noise.shape),
            num_inference_steps=3,
            width=width,
            height=height,
            control_image=pictures[0] if alone else pictures,
            controlnet_conditioning_scale=scales[0] if alone else scales,
            control_guidance_start=[one.start for one in uses],
            control_guidance_end=[one.end for one in uses],
            max_sequence_length=LENGTH,
            output_type="latent",
            **given,
        ).images
    return made._unpack_latents(tokens, height, width, scale)[0]


def asked(model: HostedModel, *uses: ControlUse, **fields: Any) -> Any:
    usual: dict[str, Any] = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "steps": 3}
    body: dict[str, Any] = {**usual, "seed": 5, **fields}
    return replace(task_of(model, **body), controls=uses)


def test_images_in_mixed_company_are_those_of_diffusers(
    pipeline: Any,
    networks: dict[str, Any],
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
) -> None:
    """One has true guidance, whose negative prompt gets the residuals of the prompt."""
    edges, depth = use(model, "edges", 1, SIZE), use(model, "depth", 2, SIZE, scale=0.5, end=0.7)
    few = use(model, "few", 3, SIZE)
    tasks = [
        asked(model, edges),
        asked(model, seed=6),
        asked(model, edges, depth, seed=7),
        asked(model, few, seed=8),
        asked(model, depth, seed=9, negative_prompt="blue", guidance={"name": "cfg", "scale": 4.0}),
        asked(model, edges, few, seed=10, sampler="heun"),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline, networks, edges))
    assert_among(decoded, theirs(pipeline, networks, replace(edges, scale=0.0), seed=6))
    assert_among(decoded, theirs(pipeline, networks, edges, depth, seed=7))
    assert_among(decoded, theirs(pipeline, networks, few, seed=8))
    true: dict[str, Any] = {"negative_prompt": "blue", "true_cfg_scale": 4.0, "guidance_scale": 1.0}
    assert_among(decoded, theirs(pipeline, networks, depth, seed=9, **true))
    assert_apart(theirs(pipeline, networks, edges), theirs(pipeline, networks, few))


def test_an_image_alone_is_that_of_diffusers(
    pipeline: Any,
    networks: dict[str, Any],
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
) -> None:
    edges = use(model, "edges", 1, SIZE)
    run(engine, [asked(model, edges)])
    assert_among(decoded, theirs(pipeline, networks, edges))
    assert_apart(decoded[0], theirs(pipeline, networks, use(model, "edges", 2, SIZE)))


def test_a_transformer_in_a_gguf_file_takes_residuals(
    pipeline: Any, networks: dict[str, Any], model: HostedModel, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "flux1-Q8_0.gguf"
    write(file, pipeline.transformer.state_dict(), "Q8_0")
    folder = with_denoiser(tmp_path / "model", file, tmp_path / "cache")
    in_blocks = load_model(folder, name="flux", device="cpu", dtype="float32")
    assert in_blocks.gguf_types == ("Q8_0",)
    transformer = FluxTransformer2DModel(**pipeline.transformer.config).eval()
    transformer.load_state_dict(restored(file))
    whole = type(pipeline)(**{**pipeline.components, "transformer": transformer})
    edges = use(model, "edges", 1, SIZE)
    seen: list[Tensor] = []
    decode = in_blocks.decode
    in_blocks.decode = lambda latents: seen.extend(latents.clone()) or decode(latents)
    engine = started(in_blocks, 4, guessed_costs={1: 0.01})
    run(engine, [asked(in_blocks, edges), asked(in_blocks, seed=6)])
    engine.stop(0)
    assert_among(seen, theirs(whole, networks, edges))


def test_one_that_embeds_its_picture_adds_to_the_blocks_in_turn(
    pipeline: Any, tmp_path: Path
) -> None:
    """Those of XLabs do, for an autoencoder whose latents are an eighth of the picture."""
    torch.manual_seed(2)
    wide: dict[str, Any] = {
        **VAE,
        "block_out_channels": (32,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    components = {**pipeline.components, "vae": AutoencoderKL(**wide).eval()}
    of_eighths: Any = type(pipeline)(**components)
    of_eighths.set_progress_bar_config(disable=True)
    own: dict[str, Any] = {"conditioning_embedding_channels": 4, "patch_size": 2}
    layers = {"num_layers": 2, "num_single_layers": 0}
    networks = {"xlabs": network({**pipeline.transformer.config}, **own, **layers)}
    # Random layers shrink their inputs.
    for parameter in networks["xlabs"].input_hint_block.parameters():
        parameter.mul_(4)
    model = hosted(of_eighths, networks, tmp_path)
    seen: list[Tensor] = []
    decode = model.decode
    model.decode = lambda latents: seen.extend(latents.clone()) or decode(latents)
    engine = started(model, 4, guessed_costs={1: 0.01})
    xlabs = use(model, "xlabs", 1, (32, 48))
    run(engine, [asked(model, xlabs, width=32, height=48)])
    engine.stop(0)
    assert_among(seen, theirs(of_eighths, networks, xlabs))
    brighter = replace(xlabs, picture=xlabs.picture.abs())
    assert_apart(seen[-1], theirs(of_eighths, networks, brighter))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, None),
        ({"num_mode": 10}, "has num_mode 10, where None is needed"),
        ({"num_layers": 4}, "has num_layers 4, where 1 to 3 are possible"),
        ({"conditioning_embedding_channels": 4}, "embeds pictures, and has a patch_size other"),
    ],
)
def test_the_controlnets_of_flux_have_its_size(
    pipeline: Any, model: HostedModel, config: dict[str, Any], says: str | None
) -> None:
    assert model.control_kind is not None
    found = model.control_kind.misfit({**pipeline.transformer.config, **LAYERS["edges"], **config})
    assert found is None if says is None else found is not None and found.startswith(says)

"""U-Nets in GGUF files draw as with their restored weights, including convolutions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guidance.edits import IdentityAttention
from server.engine.engine import Engine
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.adapters.dora import weight_of
from server.models.adapters.placing import Target
from server.models.gguf.layers import BlockConv2d, BlockLinear
from server.models.given_denoiser import with_denoiser
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.original_weights import as_diffusers as renamed
from server.models.streamed import stream_blocks
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of
from tests.server.models.adapters.low_rank import adapter, changes
from tests.server.models.alike import (
    as_diffusers,
    assert_among,
    assert_apart,
    task_of,
    their_start,
)
from tests.server.models.gguf.files import restored, write
from tests.server.models.original_networks import WITHIN, unet
from tests.server.models.tiny_sdxl import BASE, make, saved
from tests.server.toy_model import run

PROMPT = "a large red circle"
WIDTH, HEIGHT, STEPS = 64, 48, 3
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
KINDS = "Q8_0", "Q4_K"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the original names and rows of 256 numbers, like published ones."""
    folder = saved(make(BASE), tmp_path_factory.mktemp("models") / "xl")
    file = folder.parent / "xl-Q4_K_M.gguf"
    _, tensors = unet()
    own = {k.removeprefix(WITHIN): one for k, one in tensors.items() if k.startswith(WITHIN)}
    write(file, own, *KINDS, in_rows_of_256=True)
    return file


@pytest.fixture(scope="module")
def pipeline(file: Path) -> Any:
    """Diffusers' pipeline with the file's weights in float32, as the package gguf restores them."""
    made = make(BASE)
    made.unet.load_state_dict(renamed(restored(file), made.unet, "it", torch.float32))
    return made


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_denoiser(file.parent / "xl", file, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="xl", device="cpu", dtype="float32")


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, **fields: Any) -> Tensor:
    latents = their_start(pipeline, STEPS, SHAPE, seed)
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 5.0}
    given = {"num_inference_steps": STEPS, "output_type": "latent", "latents": latents}
    return pipeline(PROMPT, **size | given | fields).images[0]


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"negative_prompt": "a green star", "seed": 6},
        {"sampler": "heun", "guidance": {"name": "cfg", "perturbed": ["pag"]}, "seed": 7},
    ]
    usual = as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS)
    ear = run(engine, [task_of(model, **usual | fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    assert_among(decoded, theirs(pipeline, 6, negative_prompt="a green star"))


def test_layers_of_both_kinds_stay_in_blocks(
    pipeline: Any, model: HostedModel, folder: Path
) -> None:
    network = model.modules()["unet"]
    kinds = [type(one) for one in network.modules()]
    assert kinds.count(BlockLinear) > 20
    assert kinds.count(BlockConv2d) > 10
    # Activations have the memory layout of the weights of the first convolution.
    assert type(network.get_submodule("conv_in")) is nn.Conv2d
    assert model.memory_format == "channels_last"
    assert set(model.gguf_types) == set(KINDS)
    held, entire = (
        sum(one.nbytes for one in some.parameters()) for some in (network, pipeline.unet)
    )
    assert held < 0.35 * entire
    assert bytes_in_memory(folder, torch.float32) == pytest.approx(bytes_of(model), rel=0.01)


@torch.inference_mode()
def test_rows_are_changed_inside_as_those_of_a_network_with_restored_weights(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    dense, blocks = load(saved(pipeline, tmp_path / "dense")), load(folder)
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.ones(3)
    own = adapter("one", {"unet": changes(dense.modules()["unet"], 4)})
    inputs = replace(
        dense.inputs([PROMPT] * 3, WIDTH, HEIGHT),
        adapters=RowAdapters(((Weighted(own, 0.7),), (), ())),
        edits=[(), (IdentityAttention(("middle",)),), ()],
    )
    expected = dense.evaluate(x, t, inputs)
    plain = dense.evaluate(x, t, replace(inputs, adapters=None, edits=[()] * 3))
    assert_apart(plain[0], expected[0])
    made = blocks.evaluate(x, t, inputs)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    stream_blocks(blocks.modules()["unet"], torch.device("cpu"))
    assert torch.equal(blocks.evaluate(x, t, inputs), made)


def test_adapters_know_the_shapes_and_the_weights_of_layers_in_blocks(
    pipeline: Any, model: HostedModel
) -> None:
    ours, networks = (
        Target.of("xl", {"unet": one}) for one in (model.modules()["unet"], pipeline.unet)
    )
    assert ours.layers == networks.layers
    for name, kind in (("conv1", BlockConv2d), ("time_emb_proj", BlockLinear)):
        layer: Any = model.modules()["unet"].get_submodule(f"mid_block.resnets.0.{name}")
        assert type(layer) is kind
        expected = pipeline.unet.get_submodule(f"mid_block.resnets.0.{name}").weight
        torch.testing.assert_close(weight_of(layer, torch.float32), expected)

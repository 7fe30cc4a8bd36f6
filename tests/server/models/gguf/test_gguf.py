"""Transformers in GGUF files draw as in diffusers, and take as much memory as the file."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from torch import Tensor, nn

from server.engine.engine import Engine
from server.engine.preparation import PreparedForwards
from server.engine.state.noise import start_noise
from server.errors import ModelMismatch
from server.http.native.models import card_of
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.adapters.dora import weight_of
from server.models.compiling.model_blocks import compile_blocks
from server.models.gguf.blocks import dequantized
from server.models.gguf.layers import BlockLinear, BlockRows, kinds_of
from server.models.given_denoiser import with_denoiser
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.original_weights import as_diffusers
from server.models.parts import build_network
from server.models.placement import Placement
from server.models.streamed import stream_blocks
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of
from server.service.hosting import host
from server.service.model_shelf import ModelState
from server.settings import Settings
from tests.server.models import tiny_flux1, tiny_z_image
from tests.server.models.adapters.low_rank import changes
from tests.server.models.alike import assert_among, difference, task_of
from tests.server.models.compiling.test_compiled_blocks import Copied
from tests.server.models.gguf.files import restored, write
from tests.server.models.original_layers import FLUX_1, WIDTH, whole
from tests.server.models.original_networks import (
    WITHIN,
    flux2,
    qwen_image,
    stable_diffusion_3,
    unet,
    z_image,
)
from tests.server.toy_model import run

K_QUANTS = "Q4_K", "Q6_K", "Q8_0"
PROMPT, LONG = "a large red circle", "a small blue square above " * 3
SIDE, STEPS = 48, 2
SHAPE = (4, SIDE // 2, SIDE // 2)


def flux1() -> tuple[Any, dict[str, Tensor]]:
    """FLUX.1 under diffusers' names: the converter of the original ones needs a width of 3,072."""
    network = tiny_flux1.make(tiny_flux1.DEV, guided=True).transformer
    return network, network.state_dict()


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that tools which write GGUF files leave."""
    return {name.removeprefix(WITHIN): one for name, one in tensors.items()}


def read_by_diffusers(network: Any, file: Path) -> Any:
    """Diffusers' transformer, which rounds restored weights to float16 in any data type."""
    return type(network).from_single_file(
        str(file),
        config=str(file.parent.parent),
        subfolder=file.parent.name,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (flux1, ("Q8_0",)),
        (flux2, ("Q4_0", "Q5_1")),
        (qwen_image, ("Q4_1", "BF16")),
        (stable_diffusion_3, ("Q5_0", "F16")),
        (z_image, ("Q8_0", "BF16")),
    ],
)
def test_weights_of_a_published_file_are_what_diffusers_reads(
    make: Any, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    network, tensors = make()
    network.save_config(tmp_path / "transformer")
    file = tmp_path / "transformer" / "published-Q8_0.gguf"
    write(file, bare(tensors), *kinds)
    ours = build_network(tmp_path, "transformer", type(network), torch.float32)
    theirs = read_by_diffusers(network, file)
    layers = [name for name, one in theirs.named_modules() if isinstance(one, GGUFLinear)]
    assert len(layers) > 5
    for name in layers:
        layer, expected = ours.get_submodule(name), theirs.get_submodule(name)
        own = layer.weight
        if isinstance(layer, BlockLinear):
            own = dequantized(layer.weight, layer.kind, torch.float16)
        assert torch.equal(own, dequantize_gguf_tensor(expected.weight))
    state, rest = ours.state_dict(), theirs.state_dict()
    others = [name for name in rest if name.removesuffix(".weight") not in layers]
    assert all(torch.equal(state[name], rest[name]) for name in others)
    write(file, {**bare(tensors), "odd.weight": torch.ones(2, 32)}, *kinds)
    with pytest.raises(ModelMismatch, match=r"(odd.weight|lacks the tensor)"):
        build_network(tmp_path, "transformer", type(network), torch.float32)


@pytest.mark.parametrize(
    ("make", "names", "written"),
    [
        # ggml drops leading dimensions of one, so these lack one in files from its writer, such as
        # those of stable-diffusion.cpp and llama.cpp.
        (z_image, "[a-z]+_pad_token", lambda one: one[0]),
        (stable_diffusion_3, "pos_embed", lambda one: one[0]),
        # stable-diffusion.cpp keeps these layers of SDXL as convolutions.
        (unet, r".*\.proj_(in|out)\.weight", lambda one: one[..., None, None]),
    ],
)
def test_dimensions_of_one_do_not_matter(
    make: Any, names: str, written: Any, tmp_path: Path
) -> None:
    network, tensors = make()
    network.save_config(tmp_path / "part")
    own = {k: v for k, v in tensors.items() if k.startswith(WITHIN) or make is stable_diffusion_3}
    changed = {k: written(v) if re.fullmatch(names, k) else v for k, v in bare(own).items()}
    assert sum(changed[k].shape != v.shape for k, v in bare(own).items()) > 0
    write(tmp_path / "part" / "published.gguf", changed, "F32")
    ours = build_network(tmp_path, "part", type(network), torch.float32).state_dict()
    assert all(torch.equal(ours[k], one) for k, one in network.state_dict().items())


def test_layers_of_flux_are_cut_from_rows_of_blocks() -> None:
    """At the published width, and under the original names."""
    weights = {
        name: BlockRows.of(torch.zeros(outs * WIDTH, 18, dtype=torch.uint8), "Q4_0")
        for name, outs in FLUX_1.items()
    }
    tensors: dict[str, Tensor] = whole("FluxTransformer2DModel", {})
    tensors |= {f"{name}.weight": rows for name, rows in weights.items()}
    tensors |= {f"{name}.bias": torch.ones(len(rows)) for name, rows in weights.items()}
    with torch.device("meta"):
        network = tiny_flux1.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True
        )
    made = as_diffusers(tensors, network, "it", torch.float32)
    query: Any = made["single_transformer_blocks.0.attn.to_q.weight"]
    assert (query.kind, query.shape) == ("Q4_0", (WIDTH, 18))
    final: Any = made["norm_out.linear.weight"]
    assert (final.kind, final.shape) == ("Q4_0", (2 * WIDTH, 18))


def test_blocks_of_two_kinds_are_never_joined_to_one_weight() -> None:
    """Their rows may have as many bytes."""
    one, other = (
        BlockRows.of(torch.zeros(2, 144, dtype=torch.uint8), kind) for kind in ("Q4_0", "Q4_K")
    )
    with pytest.raises(ModelMismatch, match="weights of the types Q4_0, Q4_K would stand in one"):
        torch.cat([one, other])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of K-quants, which need rows of 256 numbers."""
    folder = tmp_path_factory.mktemp("wide")
    wide = {**tiny_z_image.TRANSFORMER, "dim": 256, "axes_dims": [32, 16, 16]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_z_image, "TRANSFORMER", wide)
        pipeline, (_, tensors) = tiny_z_image.make(3.0), z_image()
    pipeline.save_pretrained(folder)
    file = folder / "transformer" / "z-Q4_K_M.gguf"
    write(file, bare(tensors), *K_QUANTS)
    return file


@pytest.fixture(scope="module")
def pipeline(file: Path) -> Any:
    """Diffusers' pipeline with the file's weights in float32, as the package gguf restores them."""
    made: Any = tiny_z_image.ZImagePipeline.from_pretrained(file.parent.parent)
    made.set_progress_bar_config(disable=True)
    weights = as_diffusers(restored(file), made.transformer, "it", torch.float32)
    made.transformer.load_state_dict(weights)
    return made


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_denoiser(file.parent.parent, file, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path, placement: Placement | None = None) -> HostedModel:
    return load_model(folder, name="z", device="cpu", dtype="float32", placement=placement)


def asked(model: HostedModel, **fields: Any) -> Any:
    guided = {"name": "cfg", "scale": 4.0}
    body: dict[str, Any] = {"width": SIDE, "height": SIDE, "steps": STEPS, "guidance": guided}
    body |= {"prompt": PROMPT, "seed": 5, **fields}
    return task_of(model, **body)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, prompt: str = PROMPT) -> Tensor:
    """Final latents of their pipeline, whose scale counts from 0."""
    answer = pipeline(
        prompt,
        guidance_scale=3.0,
        latents=start_noise(seed, SHAPE)[None],
        num_inference_steps=STEPS,
        width=SIDE,
        height=SIDE,
        output_type="latent",
    )
    return answer.images[0]


def test_final_latents_alone_and_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    expected = theirs(pipeline)
    assert_among(decoded, expected)
    company: list[dict[str, Any]] = [
        {},
        {"prompt": LONG, "seed": 6},
        {"prompt": LONG, "sampler": "heun", "guidance": "none", "seed": 7},
    ]
    decoded.clear()
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, expected)
    assert_among(decoded, theirs(pipeline, 6, LONG))


def test_final_latents_are_those_of_diffusers_own_layers_but_for_their_rounding(
    pipeline: Any,
    file: Path,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounded(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        return dequantized(rows, kind, torch.float16).to(dtype)

    monkeypatch.setattr("server.models.gguf.layers.dequantized", rounded)
    own = read_by_diffusers(pipeline.transformer, file)
    monkeypatch.setattr(pipeline, "transformer", own)
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))


def test_a_model_takes_little_more_than_its_file_and_says_its_types(
    folder: Path, pipeline: Any, model: HostedModel
) -> None:
    transformer = model.modules()["transformer"]
    assert set(model.gguf_types) == set(K_QUANTS)
    assert kinds_of(model.modules()["vae"]) == []
    held, entire = (
        sum(one.nbytes for one in network.parameters())
        for network in (transformer, pipeline.transformer)
    )
    # Matrices whose rows are not whole blocks are in float32.
    assert held < 0.4 * entire
    assert bytes_in_memory(folder, torch.float32) == pytest.approx(bytes_of(model), rel=0.01)


def test_a_loaded_model_stays_as_it_was_when_its_file_is_overwritten_and_cut_short(
    file: Path, tmp_path: Path
) -> None:
    """Reading a memory map of a file that was cut short would end the process."""
    folder = shutil.copytree(file.parent.parent, tmp_path / "model")
    own = folder / "transformer" / file.name
    transformer = load(with_denoiser(folder, own, tmp_path / "cache")).modules()["transformer"]
    before = {name: one.clone() for name, one in transformer.state_dict().items()}
    with own.open("r+b") as opened:
        opened.write(bytes(own.stat().st_size))
    for name, one in transformer.state_dict().items():
        assert torch.equal(one, before[name]), name
    os.truncate(own, 0)
    for name, one in transformer.state_dict().items():
        assert torch.equal(one, before[name]), name


def test_a_server_says_which_file_a_model_was_given_and_in_which_types(
    file: Path, tmp_path: Path
) -> None:
    settings = Settings(
        models=(f"z={file.parent.parent}",),
        denoisers=(f"z={file}",),
        cache=tmp_path,
        device="cpu",
    )
    hosted = host(settings, guessed_costs={1: 0.01})
    hosted.engine.stop(0)
    state = ModelState("z", True, 0, hosted.models["z"], 0, 0, None, None, PreparedForwards())
    card = card_of(state)
    assert (card.denoiser, set(card.gguf_types)) == ("z-Q4_K_M", set(K_QUANTS))
    state = replace(state, model=None)
    assert (card_of(state).denoiser, card_of(state).gguf_types) == (None, ())


def test_quantizing_leaves_what_is_in_blocks_as_it_is(folder: Path) -> None:
    placement = Placement("int8")
    model = load(folder, placement)
    assert set(model.gguf_types) == set(K_QUANTS)
    foretold = bytes_in_memory(folder, torch.float32, placement)
    assert foretold == pytest.approx(bytes_of(model), rel=0.01)


def predicted(model: HostedModel, adapters: RowAdapters | None = None) -> Tensor:
    x = torch.stack([start_noise(seed, SHAPE) for seed in range(2)])
    stacked = model.stack(model.encode_prompts([PROMPT, PROMPT], SIDE, SIDE))
    with torch.inference_mode():
        return model.evaluate(x, torch.tensor([0.3, 0.7]), RowInputs(stacked, adapters=adapters))


def test_adapters_are_added_to_layers_in_blocks_row_by_row(model: HostedModel) -> None:
    transformer: Any = model.modules()["transformer"]
    layer = "layers.0.attention.to_q"
    assert isinstance(transformer.get_submodule(layer), BlockLinear)
    own = changes(transformer, 4, within=f"^{layer}$")
    adapter = Adapter("a", "0" * 16, {"transformer": own})
    untouched = predicted(model)
    adapted = predicted(model, RowAdapters(((Weighted(adapter, 1.0),), ())))
    assert torch.allclose(adapted[1], untouched[1], rtol=0, atol=1e-5)
    change = own[layer]

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + args[0] @ change.down.T @ change.up.T

    handle = transformer.get_submodule(layer).register_forward_hook(add)
    by_hand = predicted(model)
    handle.remove()
    assert difference(untouched[0], by_hand[0]) > 1e-3
    assert difference(adapted[0], by_hand[0]) < 1e-5


def test_weights_in_blocks_are_streamed_and_not_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    expected = predicted(model)
    compile_blocks(model, Copied())
    reason = f"its weights are in the blocks of a GGUF file ({model.gguf_types[0]})"
    assert (model.blocks, model.runs_eager) == (None, reason)
    stream_blocks(model.modules()["transformer"], torch.device("cpu"))
    assert torch.equal(predicted(model), expected)


def test_sizes_of_a_dora_are_set_against_restored_weights(model: HostedModel) -> None:
    layer: Any = model.modules()["transformer"].get_submodule("layers.0.attention.to_q")
    restored_weight = dequantized(layer.weight, layer.kind, torch.float32)
    assert torch.equal(weight_of(layer, torch.float32), restored_weight)


def test_transformers_that_ask_for_the_type_of_a_layer_are_told_what_it_computes_in(
    folder: Path,
) -> None:
    model = load_model(folder, name="z", device="cpu", dtype="bfloat16")
    transformer: Any = model.modules()["transformer"]
    assert transformer.dtype == torch.bfloat16
    assert type(transformer) is ZImageTransformer2DModel
    assert predicted(model).isfinite().all()

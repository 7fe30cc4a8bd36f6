"""Adapters of transformers equal diffusers with the same files, and are never read in part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from server.errors import AdapterMismatch
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.flux1 import POOLED, FluxDenoiser
from server.models.flux2 import Flux2Denoiser
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.qwen_image import QwenDenoiser
from server.models.sana import SanaDenoiser
from server.models.stable_diffusion_3 import SD3Denoiser
from server.models.z_image import ZImageDenoiser
from tests.server.models import (
    tiny_flux1,
    tiny_flux2,
    tiny_qwen_image,
    tiny_sana,
    tiny_sd3,
    tiny_z_image,
)
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.models.alike import difference
from tests.server.models.tiny_sdxl import saved as pipeline_saved
from tests.server.models.tiny_text import LENGTH

pytest.importorskip("peft", reason="diffusers loads adapters through peft")

RANK = 6
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


class Family(NamedTuple):
    """A family's tiny pipeline, and how its transformer is called.

    Attributes:
        make: makes the pipeline.
        denoiser: the transformer's, see ``server.models.transformer_model``.
        names: layers by the names of trainers that follow the original code; the first factor of
            several that it joins is common to them.
    """

    make: Callable[[], Any]
    denoiser: Callable[[Any], Any]
    names: Mapping[str, tuple[str, ...]]


def without_controls(denoiser: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """The denoiser for rows without a ControlNet, which never use the one they might have."""
    return lambda network: denoiser(network, None)


FLUX = {
    "double_blocks.0.img_attn.qkv": tuple(
        f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")
    ),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn.to_add_out",),
}
FAMILIES = {
    "flux1": Family(
        lambda: tiny_flux1.make(tiny_flux1.DEV, guided=True),
        without_controls(FluxDenoiser),
        FLUX | {"single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",)},
    ),
    "flux2": Family(
        lambda: tiny_flux2.make(distilled=True),
        Flux2Denoiser,
        FLUX | {"single_blocks.0.linear1": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",)},
    ),
    "qwen_image": Family(
        tiny_qwen_image.make,
        without_controls(QwenDenoiser),
        {"transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",)},
    ),
    "sana": Family(lambda: tiny_sana.make(sprint=False), SanaDenoiser, {}),
    "sd3": Family(tiny_sd3.make, without_controls(SD3Denoiser), {}),
    "z_image": Family(
        lambda: tiny_z_image.make(3.0),
        ZImageDenoiser,
        {"layers.0.attention.to_q": ("layers.0.attention.to_q",)},
    ),
}


class Hosted(NamedTuple):
    family: Family
    pipeline: Any
    model: HostedModel


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Hosted]:
    made: dict[str, Hosted] = {}

    def get(name: str) -> Hosted:
        if name not in made:
            family = FAMILIES[name]
            pipeline = family.make()
            folder = pipeline_saved(pipeline, tmp_path_factory.mktemp("models") / name)
            model = load_model(folder, name=name, device="cpu", dtype="float32")
            made[name] = Hosted(family, pipeline, model)
        return made[name]

    return get


def peft(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    """Changes of all linear layers, as diffusers saves them."""
    return files.peft({"transformer": changes(network, RANK)})[0]


def dora(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    """The same, with a magnitude of each output."""
    tensors = peft(network, names)
    for layer in {name.removeprefix("transformer.").partition(".lora_")[0] for name in tensors}:
        weight = network.get_submodule(layer).get_parameter("weight").detach()
        tensors[f"transformer.{layer}.lora_magnitude_vector"] = 1.1 * weight.norm(dim=1)
    return tensors


def joined(
    network: nn.Module, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors under the original code's names."""
    made = changes(network, RANK)
    return {
        name: (made[own[0]].down, torch.cat([made[layer].up for layer in own]))
        for name, own in names.items()
    }


def kohya(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    tensors: Tensors = {}
    for name, (down, up) in joined(network, names).items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    return tensors


def sparse(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    """Kohya's factors of a joint projection whose parts were trained separately, in blocks."""
    tensors = kohya(network, names)
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    blocks = torch.block_diag(*torch.ones(3, len(up) // 3, RANK // 3))
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = up * blocks
    return tensors


def trainer(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    tensors: Tensors = {}
    for name, (down, up) in joined(network, names).items():
        prefix = f"diffusion_model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return tensors


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("flux1", peft),
        ("flux1", dora),
        ("flux1", kohya),
        ("flux1", sparse),
        ("flux2", peft),
        ("flux2", kohya),
        ("flux2", trainer),
        ("qwen_image", peft),
        ("qwen_image", kohya),
        ("qwen_image", trainer),
        ("sana", peft),
        ("sd3", peft),
        ("z_image", peft),
        ("z_image", kohya),
        ("z_image", trainer),
    ],
)
@torch.inference_mode()
def test_a_row_with_an_adapter_is_that_of_diffusers_and_the_other_row_is_unmoved(
    hosted: Callable[[str], Hosted], name: str, form: Callable[..., Tensors], tmp_path: Path
) -> None:
    family, pipeline, model = hosted(name)
    path = files.saved((form(pipeline.transformer, family.names), {}), tmp_path / "one.safetensors")
    file = AdapterFile.read("one", path, Target.of(name, model.adaptable()))
    weighted = Weighted(file.load(CPU, torch.float32), 0.8)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *model.latent_shape(32, 32), generator=generator)
    t, inputs = torch.full((2,), 0.5), model.inputs(["a star"] * 2)
    rows = RowInputs(inputs.conditioning, adapters=RowAdapters(((weighted,), ())))
    ours, beside = model.evaluate(x, t, rows)
    plain = model.evaluate(x, t, inputs)
    adapted = copy.deepcopy(pipeline)
    adapted.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one")
    adapted.set_adapters(["one"], [0.8])
    theirs = family.denoiser(adapted.transformer)(x, t, inputs)
    assert difference(ours, theirs[0]) < 1e-5
    assert difference(ours, plain[0]) > 1e-3
    assert torch.equal(beside, plain[1])


WHOLE = {
    "double_blocks.0.img_attn.qkv": FLUX["double_blocks.0.img_attn.qkv"],
    "single_blocks.0.linear1": tuple(
        f"single_transformer_blocks.0.{name}"
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


class Joined:
    """A layer of a transformer as in its original code: undivided, for some with halves swapped."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self._layers = [network.get_submodule(layer) for layer in WHOLE[name]]
        self._turned = name == "final_layer.adaLN_modulation.1"

    def get(self, end: str) -> Tensor:
        whole = torch.cat([layer.get_parameter(end).detach() for layer in self._layers])
        return torch.cat(whole.chunk(2)[::-1]) if self._turned else whole

    def set(self, end: str, whole: Tensor) -> None:
        whole = torch.cat(whole.chunk(2)[::-1]) if self._turned else whole
        own = [layer.get_parameter(end) for layer in self._layers]
        for to, piece in zip(own, whole.split([len(one) for one in own]), strict=True):
            to.data = piece.clone()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def sized(whole: Joined, axis: int, seed: int) -> tuple[Tensors, Callable[[float], Tensor]]:
    """A DoRA of an undivided layer, and the layer's weight with it as a function of a factor."""
    weight = whole.get("weight")
    out, features = weight.shape
    down, up = drawn(RANK, features, seed=seed), drawn(out, RANK, seed=seed + 1)
    norms = weight.norm(dim=1 - axis, keepdim=True)
    sizes = norms * (1.2 + drawn(*norms.shape, seed=seed + 2))
    changed = weight + up @ down
    changed = sizes * changed / changed.norm(dim=1 - axis, keepdim=True)
    file = {"lora_A.weight": down, "lora_B.weight": up, "dora_scale": sizes}
    return file, lambda factor: weight + factor * (changed - weight)


def predicted(hosted: Hosted, rows: tuple[tuple[Weighted, ...], ...]) -> tuple[Any, ...]:
    model, count = hosted.model, len(rows)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *model.latent_shape(32, 32), generator=generator)
    inputs = model.inputs(["a star"] * count)
    adapted = RowInputs(inputs.conditioning, adapters=RowAdapters(rows))
    t = torch.full((count,), 0.5)
    return model.evaluate(x, t, adapted), model.evaluate(x, t, inputs), (x, t, inputs)


def loaded(hosted: Hosted, tensors: Tensors, path: Path) -> Weighted:
    files.saved((tensors, {}), path)
    file = AdapterFile.read(path.stem, path, Target.of("flux1", hosted.model.adaptable()))
    adapter = file.load(CPU, torch.float32)
    assert adapter.nbytes == file.nbytes(torch.float32)
    return Weighted(adapter, 0.8)


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", WHOLE)
@torch.inference_mode()
def test_a_dora_of_a_layer_that_diffusers_divides_has_the_sizes_of_the_whole(
    hosted: Callable[[str], Hosted], tmp_path: Path, name: str, axis: int
) -> None:
    """Two rows have different adapters, beside one without."""
    flux = hosted("flux1")
    whole, rows, expected = Joined(flux.pipeline.transformer, name), list[Weighted](), list[Any]()
    for seed in (0, 10):
        file, weight = sized(whole, axis, seed)
        tensors = {f"diffusion_model.{name}.{end}": one for end, one in file.items()}
        rows.append(loaded(flux, tensors, tmp_path / f"{seed}.safetensors"))
        merged = copy.deepcopy(flux.pipeline.transformer)
        Joined(merged, name).set("weight", weight(0.8))
        expected.append(flux.family.denoiser(merged))
    made, plain, given = predicted(flux, ((rows[0],), (), (rows[1],)))
    for row, evaluate in zip((0, 2), expected, strict=True):
        assert difference(made[row], evaluate(*given)[row]) < 1e-5
        assert difference(made[row], plain[row]) > 1e-3
    assert torch.equal(made[1], plain[1])


@pytest.mark.parametrize("name", WHOLE)
@torch.inference_mode()
def test_a_change_of_a_bias_that_diffusers_divides_is_that_of_each_part(
    hosted: Callable[[str], Hosted], tmp_path: Path, name: str
) -> None:
    """ComfyUI's LoraSave writes it beside each LoRA."""
    flux = hosted("flux1")
    merged = copy.deepcopy(flux.pipeline.transformer)
    whole = Joined(merged, name)
    out, features = whole.get("weight").shape
    down, up, moved = drawn(2, features, seed=1), drawn(out, 2, seed=2), drawn(out, seed=3)
    ends = {"lora_down.weight": down, "lora_up.weight": up, "diff_b": moved}
    tensors = {f"diffusion_model.{name}.{end}": one for end, one in ends.items()}
    one = loaded(flux, tensors, tmp_path / "one.safetensors")
    whole.set("weight", whole.get("weight") + 0.8 * up @ down)
    whole.set("bias", whole.get("bias") + 0.8 * moved)
    made, plain, given = predicted(flux, ((), (one,)))
    assert difference(made[1], flux.family.denoiser(merged)(*given)[1]) < 1e-5
    assert torch.equal(made[0], plain[0])


QUERY_NORM = {
    "flux1": "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff",
    "flux2": "diffusion_model.single_blocks.0.norm.query_norm.scale.diff",
    "qwen_image": "transformer.txt_norm.w_norm",
    "sana": "lycoris_caption_norm.w_norm",
    "sd3": "diffusion_model.joint_blocks.0.context_block.attn.ln_q.diff",
    "z_image": "diffusion_model.cap_embedder.0.diff",
}
NORM = {
    "flux1": "transformer_blocks.0.attn.norm_q",
    "flux2": "single_transformer_blocks.0.attn.norm_q",
    "qwen_image": "txt_norm",
    "sana": "caption_norm",
    "sd3": "transformer_blocks.0.attn.norm_added_q",
    "z_image": "cap_embedder.0",
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_row_with_a_change_of_a_norm_is_that_of_the_changed_network(
    hosted: Callable[[str], Hosted], tmp_path: Path, name: str
) -> None:
    family = hosted(name)
    merged = copy.deepcopy(family.pipeline.transformer)
    weight = merged.get_submodule(NORM[name]).get_parameter("weight")
    moved = 100 * drawn(len(weight), seed=3)
    one = loaded(family, {QUERY_NORM[name]: moved}, tmp_path / "one.safetensors")
    weight.data += 0.8 * moved
    made, plain, given = predicted(family, ((), (one,)))
    assert difference(made[1], family.family.denoiser(merged)(*given)[1]) < 1e-5
    assert difference(made[1], plain[1]) > 1e-3
    assert torch.equal(made[0], plain[0])


def test_a_joined_projection_as_wide_as_one_of_its_parts_is_refused(
    hosted: Callable[[str], Hosted], tmp_path: Path
) -> None:
    sd3, written = hosted("sd3"), "joint_blocks.0.x_block.attn.qkv"
    name = "transformer_blocks.0.attn.to_q"
    out, features = sd3.pipeline.transformer.get_submodule(name).weight.shape
    ends = {"lora_down": torch.ones(2, features), "lora_up": torch.ones(out, 2)}
    tensors = {f"diffusion_model.{written}.{end}.weight": one for end, one in ends.items()}
    path = files.saved((tensors, {}), tmp_path / "one.safetensors")
    says = rf"has {out} outputs in .*{written}.lora_up.weight, .* with {3 * out} outputs together"
    with pytest.raises(AdapterMismatch, match=says):
        AdapterFile.read("one", path, Target.of("sd3", sd3.model.adaptable()))


@torch.inference_mode()
def test_the_text_encoder_of_flux_is_adapted_as_by_diffusers(
    hosted: Callable[[str], Hosted], tmp_path: Path
) -> None:
    _, pipeline, model = hosted("flux1")
    own = {"text_encoder": changes(pipeline.text_encoder, RANK, within="layers")}
    path = files.saved(files.kohya(own), tmp_path / "one.safetensors")
    file = AdapterFile.read("one", path, Target.of("flux1", model.adaptable()))
    weighted = Weighted(file.load(CPU, torch.float32), 1.0)
    [ours] = model.encode_prompts(["a star"], 32, 32, RowAdapters(((weighted,),)))
    [plain] = model.encode_prompts(["a star"], 32, 32)
    adapted = copy.deepcopy(pipeline)
    adapted.load_lora_weights(path.parent, weight_name=path.name)
    _, theirs, _ = adapted.encode_prompt("a star", max_sequence_length=LENGTH)
    assert difference(ours.tensors[POOLED], theirs[0]) < 1e-5
    assert difference(ours.tensors[POOLED], plain.tensors[POOLED]) > 1e-2


@torch.inference_mode()
def test_a_change_of_a_norm_of_a_text_encoder_is_in_what_it_tells(
    hosted: Callable[[str], Hosted], tmp_path: Path
) -> None:
    """Named as by LyCORIS, and used for one of two prompts."""
    _, pipeline, model = flux = hosted("flux1")
    moved = drawn(pipeline.text_encoder.config.hidden_size, seed=5)
    name = "lora_te1_text_model_encoder_layers_0_layer_norm1.w_norm"
    one = loaded(flux, {name: moved}, tmp_path / "one.safetensors")
    rows = RowAdapters(((one,), ()))
    ours, beside = model.encode_prompts(["a star", "a star"], 32, 32, rows)
    _, plain = model.encode_prompts(["a star", "a star"], 32, 32)
    changed = copy.deepcopy(pipeline)
    norms = dict(changed.text_encoder.named_modules())
    [norm] = [norm for layer, norm in norms.items() if layer.endswith("layers.0.layer_norm1")]
    norm.weight.data += 0.8 * moved
    _, theirs, _ = changed.encode_prompt("a star", max_sequence_length=LENGTH)
    assert difference(ours.tensors[POOLED], theirs[0]) < 1e-5
    assert difference(ours.tensors[POOLED], plain.tensors[POOLED]) > 1e-2
    assert torch.equal(beside.tensors[POOLED], plain.tensors[POOLED])

"""Adapters of transformers are what diffusers makes of the same files, and none is half read."""

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
        make: the pipeline.
        denoiser: the transformer's, see ``server.models.transformer_model``.
        names: layers by the names of trainers that follow the original code; the first factor of
            several that it joins is common to them.
    """

    make: Callable[[], Any]
    denoiser: Callable[[Any], Any]
    names: Mapping[str, tuple[str, ...]]


def without_controls(denoiser: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """For rows that no ControlNet acts on, which never look at the one they might have."""
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
    """All linear layers, as diffusers saves."""
    return files.peft({"transformer": changes(network, RANK)})[0]


def dora(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    """The same, with a size of each output."""
    tensors = peft(network, names)
    for layer in {name.removeprefix("transformer.").partition(".lora_")[0] for name in tensors}:
        weight = network.get_submodule(layer).get_parameter("weight").detach()
        tensors[f"transformer.{layer}.lora_magnitude_vector"] = 1.1 * weight.norm(dim=1)
    return tensors


def joined(
    network: nn.Module, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by the original code's names."""
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
    """Kohya's, of a joint projection whose parts were trained apart: their factors in blocks."""
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


def test_a_dora_of_layers_that_diffusers_divides_is_refused(
    hosted: Callable[[str], Hosted], tmp_path: Path
) -> None:
    family, pipeline, model = hosted("flux1")
    tensors = trainer(pipeline.transformer, family.names)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors[f"{name}.dora_scale"] = torch.ones(len(tensors[f"{name}.lora_B.weight"]), 1)
    path = files.saved((tensors, {}), tmp_path / "one.safetensors")
    with pytest.raises(AdapterMismatch, match=f"in pieces or in another order .{name}.dora_scale"):
        AdapterFile.read("one", path, Target.of("flux1", model.adaptable()))


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

"""Networks are read from files under the names of their original code, whatever the file's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from server.errors import ModelMismatch
from server.models.original_weights import as_diffusers
from server.models.parts import build_network
from tests.server.models import tiny_flux2, tiny_qwen_image, tiny_sdxl, tiny_z_image
from tests.server.models.original_layers import FLUX_1, WIDTH, whole
from tests.server.models.original_names import checkpoint

WITHIN = "model.diffusion_model."


def joined(state: dict[str, Tensor], three: tuple[str, str, str], one: str) -> None:
    """Joins queries, keys and values of all blocks."""
    for name in [name for name in state if re.search(rf"{three[0]}\.weight$", name)]:
        own = [state.pop(name.replace(three[0], other)) for other in three]
        state[name.replace(three[0], one)] = torch.cat(own)


def renamed(state: dict[str, Tensor], patterns: dict[str, str]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name
        for pattern, original in patterns.items():
            own = re.sub(pattern, original, own)
        made[own] = tensor
    return made


def z_image() -> tuple[Any, dict[str, Tensor]]:
    """As ComfyUI's files hold it, with a norm that is not used."""
    network = tiny_z_image.make(3.0).transformer
    state = dict(network.state_dict())
    joined(state, ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv")
    names = {
        r"^all_(x_embedder|final_layer)\.2-1\.": r"\1.",
        r"attention\.to_out\.0\.": "attention.out.",
        r"attention\.norm_([qk])\.": r"attention.\1_norm.",
    }
    unused = {"norm_final.weight": torch.ones(4)}
    return network, {f"{WITHIN}{k}": v for k, v in (renamed(state, names) | unused).items()}


def flux2() -> tuple[Any, dict[str, Tensor]]:
    network = tiny_flux2.make(distilled=True).transformer
    state = dict(network.state_dict())
    joined(state, ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv")
    joined(state, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv")
    shift, scale = reversed(state["norm_out.linear.weight"].chunk(2))
    state["norm_out.linear.weight"] = torch.cat([shift, scale])
    names = {
        r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
        r"^single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": (
            r"single_blocks.\1.norm.query_norm.scale"
        ),
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": (
            r"single_blocks.\1.norm.key_norm.scale"
        ),
        r"^transformer_blocks\.": "double_blocks.",
        r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
        r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
        r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
        r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
        r"\.attn\.to_out\.0": ".img_attn.proj",
        r"\.attn\.to_add_out": ".txt_attn.proj",
        r"\.ff\.linear_in": ".img_mlp.0",
        r"\.ff\.linear_out": ".img_mlp.2",
        r"\.ff_context\.linear_in": ".txt_mlp.0",
        r"\.ff_context\.linear_out": ".txt_mlp.2",
        r"^x_embedder": "img_in",
        r"^context_embedder": "txt_in",
        r"^time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"^time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"modulation(_\w+)?\.linear\.": r"modulation\1.lin.",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^proj_out": "final_layer.linear",
    }
    return network, renamed(state, names)


def qwen_image() -> tuple[Any, dict[str, Tensor]]:
    """Under diffusers' own names, and the prefix of ComfyUI's files."""
    network = tiny_qwen_image.make().transformer
    return network, {f"{WITHIN}{k}": v for k, v in network.state_dict().items()}


def unet() -> tuple[Any, dict[str, Tensor]]:
    """A whole checkpoint, of which the U-Net is taken."""
    pipeline = tiny_sdxl.make(tiny_sdxl.BASE)
    return pipeline.unet, checkpoint(pipeline)


@pytest.mark.parametrize("make", [z_image, flux2, qwen_image, unet])
def test_a_published_file_in_the_folder_of_a_network_is_read(make: Any, tmp_path: Path) -> None:
    network, tensors = make()
    network.save_config(tmp_path / "part")
    save_file(
        {name: one.clone() for name, one in tensors.items()},
        tmp_path / "part" / "published-v1.0.safetensors",
    )
    ours = build_network(tmp_path, "part", type(network), torch.float32).state_dict()
    theirs = network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_file({f"{WITHIN}odd": torch.ones(1)}, tmp_path / "part" / "published-v1.0.safetensors")
    with pytest.raises(ModelMismatch, match="lacks the tensor"):
        build_network(tmp_path, "part", type(network), torch.float32)


def test_all_layers_of_flux_have_the_names_of_diffusers() -> None:
    """Of the published width, which its converter counts on."""
    weights = {name: torch.ones(outs * WIDTH, 1) for name, outs in FLUX_1.items()}
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    tensors = whole("FluxTransformer2DModel", weights)
    made = as_diffusers(tensors, network, "it", torch.float32)
    assert made.keys() == network.state_dict().keys()

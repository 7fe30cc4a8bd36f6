"""Tiny networks, and their tensors under the names of their original code, as files have them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.server.models import (
    tiny_flux2,
    tiny_pixart,
    tiny_qwen_image,
    tiny_sana,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.server.models.original_names import checkpoint

WITHIN = "model.diffusion_model."


def joined(
    state: dict[str, Tensor], three: tuple[str, ...], one: str, kind: str = "weight"
) -> None:
    """Joins queries, keys and values of all blocks, or some of them."""
    for name in [name for name in state if re.search(rf"{three[0]}\.{kind}$", name)]:
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
    """Z-Image as in ComfyUI's files, with a norm that is not used."""
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
    """Qwen-Image under diffusers' own names, with the prefix of ComfyUI's files."""
    network = tiny_qwen_image.make().transformer
    return network, {f"{WITHIN}{k}": v for k, v in network.state_dict().items()}


def stable_diffusion_3() -> tuple[Any, dict[str, Tensor]]:
    network = tiny_sd3.make(with_t5=False).transformer
    state = dict(network.state_dict())
    for kind in ("weight", "bias"):
        joined(state, ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv", kind)
        joined(state, ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv", kind)
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        joined(state, added, "context_block.attn.qkv", kind)
        # The layers of the last norms put out shift and scale in the other order.
        for layer in (f"transformer_blocks.{tiny_sd3.BLOCKS - 1}.norm1_context", "norm_out"):
            scale, shift = state[f"{layer}.linear.{kind}"].chunk(2)
            state[f"{layer}.linear.{kind}"] = torch.cat([shift, scale])
    names = {
        r"^transformer_blocks\.(\d+)\.": r"joint_blocks.\1.",
        r"\.(attn2?)\.norm_([qk])\.": r".x_block.\1.ln_\2.",
        r"\.attn\.norm_added_([qk])\.": r".context_block.attn.ln_\1.",
        r"\.(attn2?)\.to_out\.0\.": r".x_block.\1.proj.",
        r"\.attn\.to_add_out\.": ".context_block.attn.proj.",
        r"\.norm1\.linear\.": ".x_block.adaLN_modulation.1.",
        r"\.norm1_context\.linear\.": ".context_block.adaLN_modulation.1.",
        r"\.ff\.net\.0\.proj\.": ".x_block.mlp.fc1.",
        r"\.ff\.net\.2\.": ".x_block.mlp.fc2.",
        r"\.ff_context\.net\.0\.proj\.": ".context_block.mlp.fc1.",
        r"\.ff_context\.net\.2\.": ".context_block.mlp.fc2.",
        r"^pos_embed\.pos_embed": "pos_embed",
        r"^pos_embed\.proj\.": "x_embedder.proj.",
        r"^time_text_embed\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
        r"^time_text_embed\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
        r"^time_text_embed\.text_embedder\.linear_1\.": "y_embedder.mlp.0.",
        r"^time_text_embed\.text_embedder\.linear_2\.": "y_embedder.mlp.2.",
        r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
        r"^proj_out\.": "final_layer.linear.",
    }
    return network, renamed(state, names)


def pixart() -> tuple[Any, dict[str, Tensor]]:
    """After ``PixArtMS`` of PixArt-alpha/PixArt-sigma, with sizes as inputs as in PixArt-alpha."""
    network = tiny_pixart.make("alpha").transformer
    state = dict(network.state_dict())
    for kind in ("weight", "bias"):
        joined(state, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.qkv", kind)
        joined(state, ("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear", kind)
    names = {
        r"^scale_shift_table": "final_layer.scale_shift_table",
        r"^transformer_blocks\.": "blocks.",
        r"\.attn1\.to_out\.0\.": ".attn.proj.",
        r"\.attn2\.to_q\.": ".cross_attn.q_linear.",
        r"\.attn2\.to_out\.0\.": ".cross_attn.proj.",
        r"\.ff\.net\.0\.proj\.": ".mlp.fc1.",
        r"\.ff\.net\.2\.": ".mlp.fc2.",
        r"^pos_embed\.proj\.": "x_embedder.proj.",
        r"^caption_projection\.linear_(\d)\.": r"y_embedder.y_proj.fc\1.",
        r"^adaln_single\.linear\.": "t_block.1.",
        r"^adaln_single\.emb\.timestep_embedder\.": "t_embedder.",
        r"^adaln_single\.emb\.resolution_embedder\.": "csize_embedder.",
        r"^adaln_single\.emb\.aspect_ratio_embedder\.": "ar_embedder.",
        r"_embedder\.linear_1\.": "_embedder.mlp.0.",
        r"_embedder\.linear_2\.": "_embedder.mlp.2.",
        r"^proj_out\.": "final_layer.linear.",
    }
    unused = {"pos_embed": torch.ones(1, 4, 48), "y_embedder.y_embedding": torch.ones(120, 24)}
    return network, renamed(state, names) | unused


def sana(*, sprint: bool) -> tuple[Any, dict[str, Tensor]]:
    """After ``SanaMS`` and ``SanaMSCM`` of NVlabs/Sana."""
    network = tiny_sana.make(sprint=sprint).transformer
    state = dict(network.state_dict())
    joined(state, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.qkv")
    for kind in ("weight", "bias"):
        joined(state, ("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear", kind)
    names = {
        r"^scale_shift_table": "final_layer.scale_shift_table",
        r"^transformer_blocks\.": "blocks.",
        r"\.attn1\.norm_([qk])\.": r".attn.\1_norm.",
        r"\.attn2\.norm_([qk])\.": r".cross_attn.\1_norm.",
        r"\.attn1\.to_out\.0\.": ".attn.proj.",
        r"\.attn2\.to_q\.": ".cross_attn.q_linear.",
        r"\.attn2\.to_out\.0\.": ".cross_attn.proj.",
        r"\.ff\.conv_(\w+)\.": r".mlp.\1_conv.conv.",
        r"^patch_embed\.proj\.": "x_embedder.proj.",
        r"^caption_projection\.linear_(\d)\.": r"y_embedder.y_proj.fc\1.",
        r"^caption_norm\.": "attention_y_norm.",
        r"^time_embed\.linear\.": "t_block.1.",
        r"^time_embed\.(emb\.)?timestep_embedder\.": "t_embedder.",
        r"^time_embed\.guidance_embedder\.": "cfg_embedder.",
        r"_embedder\.linear_1\.": "_embedder.mlp.0.",
        r"_embedder\.linear_2\.": "_embedder.mlp.2.",
        r"^proj_out\.": "final_layer.linear.",
    }
    unused = {"pos_embed": torch.ones(1, 4, 16), "y_embedder.y_embedding": torch.ones(8, 16)}
    return network, renamed(state, names) | unused


def sana_1() -> tuple[Any, dict[str, Tensor]]:
    return sana(sprint=False)


def unet() -> tuple[Any, dict[str, Tensor]]:
    """A whole checkpoint, of which only the U-Net is used."""
    pipeline = tiny_sdxl.make(tiny_sdxl.BASE)
    return pipeline.unet, checkpoint(pipeline)

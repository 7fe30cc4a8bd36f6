"""Stable Diffusion's original names of the tensors of a tiny pipeline, the inverse of diffusers'.

After diffusers' ``scripts/convert_diffusers_to_original_sdxl.py``, for one ResNet per level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEVELS = 2

UNET = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    (r"^down_blocks\.0\.resnets\.0\.", "input_blocks.1.0."),
    (r"^down_blocks\.0\.downsamplers\.0\.conv\.", "input_blocks.2.0.op."),
    (r"^down_blocks\.1\.resnets\.0\.", "input_blocks.3.0."),
    (r"^down_blocks\.1\.attentions\.0\.", "input_blocks.3.1."),
    (r"^up_blocks\.0\.resnets\.(\d)\.", r"output_blocks.\1.0."),
    (r"^up_blocks\.0\.attentions\.(\d)\.", r"output_blocks.\1.1."),
    (r"^up_blocks\.0\.upsamplers\.0\.", "output_blocks.1.2."),
    (r"^up_blocks\.1\.resnets\.0\.", "output_blocks.2.0."),
    (r"^up_blocks\.1\.resnets\.1\.", "output_blocks.3.0."),
)
RESNET = (
    (r"\.norm1\.(?=(weight|bias)$)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.(?=(weight|bias)$)", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
AUTOENCODER = (
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.0\.resnets\.(\d)\.", r"up.1.block.\1."),
    (r"up_blocks\.1\.resnets\.(\d)\.", r"up.0.block.\1."),
    (r"up_blocks\.0\.upsamplers\.0\.", "up.1.upsample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
WAN_RESNET = (
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
WAN = (
    (r"^post_quant_conv\.", "conv2."),
    (r"^quant_conv\.", "conv1."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)
OPEN_CLIP = (
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_projection\.weight$", "text_projection"),
)


def checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a tiny SDXL pipeline as in a single file."""
    unet = {unet_name(name): tensor for name, tensor in pipeline.unet.state_dict().items()}
    first = {f"text_model.{_plain(k)}": v for k, v in pipeline.text_encoder.state_dict().items()}
    return {
        **_within("model.diffusion_model.", unet),
        **_within("first_stage_model.", autoencoder(pipeline.vae)),
        **_within("conditioner.embedders.0.transformer.", first),
        **_within("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2)),
    }


def second_checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a tiny Stable Diffusion 2, whose U-Net has one level of two ResNets."""
    unet = {second_unet_name(name): one for name, one in pipeline.unet.state_dict().items()}
    return {
        **_within("model.diffusion_model.", unet),
        **_within("first_stage_model.", autoencoder(pipeline.vae)),
        **_within("cond_stage_model.model.", _open_clip(pipeline.text_encoder)),
    }


def second_unet_name(name: str) -> str:
    """The original name of a tensor of that U-Net."""
    for side, first in (("down", 1), ("up", 0)):
        if found := re.match(rf"{side}_blocks\.0\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, number, rest = found.groups()
            blocks = "input_blocks" if side == "down" else "output_blocks"
            own = f"{blocks}.{first + int(number)}.{int(kind == 'attentions')}.{rest}"
            return _name(own, RESNET) if kind == "resnets" else own
    return unet_name(name)


def unet_name(name: str) -> str:
    """The original name of a tensor of a tiny U-Net, or of a ControlNet's copy of its encoder."""
    own = _name(name, UNET)
    # Only ResNets, since transformers have layers of the same names.
    is_resnet = re.match(r"(in|out)put_blocks\.\d\.0\.|middle_block\.[02]\.", own)
    return _name(own, RESNET) if is_resnet else own


def flux_2_autoencoder(network: Any) -> dict[str, Tensor]:
    """After ``AutoEncoder`` of black-forest-labs/flux2, whose sides hold the outer convolutions."""
    sides = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    made = autoencoder(network)
    return {re.sub(r"^\w+", lambda first: sides.get(first[0], first[0]), k): made[k] for k in made}


def wan_autoencoder(network: Any) -> dict[str, Tensor]:
    """After ``WanVAE`` of ComfyUI, whose names Qwen-Image's autoencoder also has.

    Args:
        network: a network of four levels, with three ResNets in each level of the decoder.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        own = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)",
            lambda at: f"upsamples.{4 * int(at[1]) + (int(at[3]) if at[2] == 'resnets' else 3)}",
            name,
        )
        own = _name(own, WAN)
        is_resnet = re.search(r"\.(middle|downsamples|upsamples)\.", own)
        made[_name(own, WAN_RESNET) if is_resnet else own] = tensor
    return made


def autoencoder(network: Any) -> dict[str, Tensor]:
    """The autoencoder of Stable Diffusion and FLUX.1, for two levels."""
    made = _renamed(network.state_dict(), AUTOENCODER)
    for name, tensor in made.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            made[name] = tensor[:, :, None, None]
    return made


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    plain = {_plain(name): tensor for name, tensor in encoder.state_dict().items()}
    made = _renamed(plain, OPEN_CLIP)
    if "text_projection" in made:
        made["text_projection"] = made["text_projection"].T
    for layer in range(encoder.config.num_hidden_layers):
        own = f"transformer.resblocks.{layer}.attn."
        for kind in ("weight", "bias"):
            three = [made.pop(f"{own}{one}_proj.{kind}") for one in "qkv"]
            made[f"{own}in_proj_{kind}"] = torch.cat(three)
    return made


def _plain(name: str) -> str:
    return name.removeprefix("text_model.")


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone().contiguous() for name, tensor in tensors.items()}


def _renamed(
    tensors: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    return {_name(name, patterns): tensor for name, tensor in tensors.items()}


def _name(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    for pattern, original in patterns:
        name = re.sub(pattern, original, name)
    return name

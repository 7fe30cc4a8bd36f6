"""Renames the tensors of PixArt's original code, for which diffusers has no converter.

Based on ``tools/convert_pixart_to_diffusers.py`` of PixArt-alpha/PixArt-sigma.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["pixart_as_diffusers"]

IGNORED_TENSORS: Final = ("pos_embed", "y_embedder.y_embedding")
"""The position table, which is computed, and the empty text used in training."""

JOINED: Final = re.compile(r"blocks\.(\d+)\.(attn\.qkv|cross_attn\.kv_linear)\.(weight|bias)")
PARTS: Final = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
"""Layers that the original code fuses into one, and their diffusers names."""

EMBEDDERS: Final = {
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
RENAMED: Final = {
    "x_embedder.proj.": "pos_embed.proj.",
    "y_embedder.y_proj.fc1.": "caption_projection.linear_1.",
    "y_embedder.y_proj.fc2.": "caption_projection.linear_2.",
    "t_block.1.": "adaln_single.linear.",
    "final_layer.linear.": "proj_out.",
    "final_layer.scale_shift_table": "scale_shift_table",
} | {
    f"{original}.mlp.{place}.": f"adaln_single.emb.{name}.linear_{number}."
    for original, name in EMBEDDERS.items()
    for place, number in ((0, 1), (2, 2))
}
BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.*)")
WITHIN_BLOCKS: Final = {
    "attn.proj.": "attn1.to_out.0.",
    "cross_attn.q_linear.": "attn2.to_q.",
    "cross_attn.proj.": "attn2.to_out.0.",
    "mlp.fc1.": "ff.net.0.proj.",
    "mlp.fc2.": "ff.net.2.",
}


def pixart_as_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the transformer to diffusers' names; unknown names are kept.

    Args:
        tensors: tensors by their original names, without a prefix.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if joined := JOINED.fullmatch(name):
            number, layer, kind = joined.groups()
            parts = PARTS[layer]
            for part, own in zip(parts, tensor.chunk(len(parts)), strict=True):
                made[f"transformer_blocks.{number}.{part}.{kind}"] = own
        elif block := BLOCK.fullmatch(name):
            number, rest = block.groups()
            made[f"transformer_blocks.{number}.{_renamed(rest, WITHIN_BLOCKS)}"] = tensor
        elif name not in IGNORED_TENSORS:
            made[_renamed(name, RENAMED)] = tensor
    return made


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for original, own in names.items():
        if name.startswith(original):
            return own + name.removeprefix(original)
    return name

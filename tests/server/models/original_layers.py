"""Linear layers of transformers by the names of their original code, in one block of each kind.

After the modules of black-forest-labs' FLUX.1 and FLUX.2, Z-Image as ComfyUI builds it, and
Stability AI's Stable Diffusion 3, whose last block is of another kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

WIDTH = 3072
"""Width of FLUX.1, the only one that its converter of checkpoints accepts."""


def flux(names: Iterable[str], streams: dict[str, int]) -> dict[str, int]:
    """Outputs of the layers of both kinds of blocks, and of the others."""
    block = {"attn.qkv": 3, "attn.proj": 1, "mlp.0": 4, "mlp.2": 1} | streams
    double = {f"double_blocks.0.{s}_{name}": n for s in ("img", "txt") for name, n in block.items()}
    single = {"single_blocks.0.linear1": 7, "single_blocks.0.linear2": 1}
    ends = {"img_in": 1, "txt_in": 1, "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2}
    return double | single | ends | dict.fromkeys(names, 1)


EMBEDDERS = [f"{of}_in.{side}_layer" for of in ("time", "guidance") for side in ("in", "out")]
VECTOR = ["vector_in.in_layer", "vector_in.out_layer"]
MODULATIONS = [
    "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.lin",
    "single_stream_modulation.lin",
]
NORMS = [
    *(f"double_blocks.0.{s}_attn.norm.{n}_norm" for s in ("img", "txt") for n in ("query", "key")),
    *(f"single_blocks.0.norm.{n}_norm" for n in ("query", "key")),
]
NORMS_OF: Mapping[str, list[str]] = {
    "FluxTransformer2DModel": [f"{name}.scale" for name in NORMS],
    "Flux2Transformer2DModel": [f"{name}.scale" for name in NORMS],
    "ZImageTransformer2DModel": [
        *(
            f"{block}.0.attention.{n}_norm.weight"
            for block in ("layers", "noise_refiner", "context_refiner")
            for n in "qk"
        ),
        "layers.0.attention_norm1.weight",
        "cap_embedder.0.weight",
    ],
    "SD3Transformer2DModel": [
        f"joint_blocks.{block}_block.{attention}.ln_{n}.weight"
        for block, attention in (
            *(("0.x", "attn"), ("0.x", "attn2"), ("0.context", "attn")),
            *(("1.x", "attn"), ("1.context", "attn")),
        )
        for n in "qk"
    ],
}
"""Weights of the norms that these blocks may have."""
FLUX_1 = flux([*EMBEDDERS, *VECTOR, "single_blocks.0.modulation.lin"], {"mod.lin": 6})
FLUX_2 = flux([*EMBEDDERS, *MODULATIONS], {})
Z_IMAGE = {
    **{
        f"{block}.0.attention.{name}": outs
        for block in ("layers", "noise_refiner", "context_refiner")
        for name, outs in (("qkv", 3), ("out", 1))
    },
    "x_embedder": 1,
    "final_layer.linear": 1,
    "final_layer.adaLN_modulation.1": 1,
}
STABLE_DIFFUSION_3 = {
    **{
        f"joint_blocks.{block}.{stream}_block.{name}": outs
        for block, stream in ((0, "x"), (0, "context"), (1, "x"))
        for name, outs in (
            *(("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 1)),
            # A block with a second attention, like those of 3.5 medium.
            ("adaLN_modulation.1", 9 if (block, stream) == (0, "x") else 6),
        )
    },
    "joint_blocks.0.x_block.attn2.qkv": 3,
    "joint_blocks.0.x_block.attn2.proj": 1,
    "joint_blocks.1.context_block.attn.qkv": 3,
    "joint_blocks.1.context_block.adaLN_modulation.1": 2,
    **{f"{one}_embedder.mlp.{place}": 1 for one in "ty" for place in (0, 2)},
    "context_embedder": 1,
    "final_layer.linear": 1,
    "final_layer.adaLN_modulation.1": 2,
}


def whole(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a transformer with these weights."""
    made = {f"{name}.weight": weight for name, weight in weights.items()}
    if kind.startswith("Flux"):
        made |= {name: torch.ones(1) for name in NORMS_OF[kind]}
    if kind in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        made |= {f"{name}.bias": torch.ones(len(one)) for name, one in weights.items()}
    if kind == "SD3Transformer2DModel":
        made |= dict.fromkeys(["pos_embed", "x_embedder.proj.weight"], torch.ones(1, 1, 1))
        made["x_embedder.proj.bias"] = torch.ones(1)
    return made

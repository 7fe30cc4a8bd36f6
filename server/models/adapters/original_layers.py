"""Layers and norms of transformers by the names of their original code and of diffusers.

The mapping is that of diffusers' converters of whole checkpoints
(``loaders/single_file_utils.py``). Its converters of LoRA files know fewer layers, and only
networks of the published sizes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ORIGINAL", "Original"]


class Original(NamedTuple):
    """A layer of a transformer's original code.

    Attributes:
        name: a pattern of its name, with underscores instead of dots.
        layers: layers of diffusers that it consists of, in order; ``{0}`` is the block's number.
        turned: whether the halves of its output are swapped, if its output is twice as wide as its
            input. The last block of Stable Diffusion 3 has such a layer where others have one that
            is not swapped.
    """

    name: str
    layers: tuple[str, ...]
    turned: bool = False

    def turns(self, layer: str, shape: tuple[int, ...]) -> bool:
        """Whether the halves of a layer's output are swapped.

        Args:
            layer: name of the layer in diffusers.
            shape: shape of its weight.
        """
        return self.turned and shape[:1] == (2 * shape[-1],) and self._is(layer)

    def _is(self, layer: str) -> bool:
        return any(
            re.fullmatch(re.escape(own).replace(r"\{0\}", r"\d+"), layer) for own in self.layers
        )


def _stream(name: str, short: str, added: str, out: str, ff: str) -> list[Original]:
    """Attention and feed-forward layers of one of the two streams of FLUX.1 and FLUX.2."""
    block, original = "transformer_blocks.{0}", rf"double_blocks_(\d+)_{short}"
    norm = "attn.norm_added" if name == "ff_context" else "attn.norm"
    three = tuple(f"{block}.attn.{added.format(one)}" for one in "qkv")
    return [
        Original(f"{original}_attn_qkv", three),
        Original(f"{original}_attn_proj", (f"{block}.attn.{out}",)),
        *_norms(f"{original}_attn_norm", f"{block}.{norm}"),
        Original(f"{original}_mlp_0", (f"{block}.{name}.{ff.split()[0]}",)),
        Original(f"{original}_mlp_2", (f"{block}.{name}.{ff.split()[1]}",)),
    ]


def _norms(original: str, norm: str) -> list[Original]:
    """Norms of queries and keys in FLUX.1 and FLUX.2; the original code has ``scale`` weights."""
    return [
        Original(f"{original}_{name}_norm(?:_scale)?", (f"{norm}_{name[0]}",))
        for name in ("query", "key")
    ]


def _streams(ff: str) -> tuple[Original, ...]:
    return (
        *_stream("ff", "img", "to_{}", "to_out.0", ff),
        *_stream("ff_context", "txt", "add_{}_proj", "to_add_out", ff),
        Original("img_in", ("x_embedder",)),
        Original("txt_in", ("context_embedder",)),
        Original("final_layer_linear", ("proj_out",)),
        Original("final_layer_adaLN_modulation_1", ("norm_out.linear",), turned=True),
    )


def _embedders(within: str, of: Mapping[str, str]) -> tuple[Original, ...]:
    return tuple(
        Original(f"{name}_{side}_layer", (f"{within}.{embedder}.linear_{number}",))
        for name, embedder in of.items()
        for number, side in enumerate(("in", "out"), 1)
    )


_SINGLE = "single_transformer_blocks.{0}"
_FLUX_1 = (
    *_streams("net.0.proj net.2"),
    Original(r"double_blocks_(\d+)_img_mod_lin", ("transformer_blocks.{0}.norm1.linear",)),
    Original(r"double_blocks_(\d+)_txt_mod_lin", ("transformer_blocks.{0}.norm1_context.linear",)),
    Original(
        r"single_blocks_(\d+)_linear1",
        (*(f"{_SINGLE}.attn.to_{one}" for one in "qkv"), f"{_SINGLE}.proj_mlp"),
    ),
    Original(r"single_blocks_(\d+)_linear2", (f"{_SINGLE}.proj_out",)),
    *_norms(r"single_blocks_(\d+)_norm", f"{_SINGLE}.attn.norm"),
    Original(r"single_blocks_(\d+)_modulation_lin", (f"{_SINGLE}.norm.linear",)),
    *_embedders(
        "time_text_embed",
        {
            "time_in": "timestep_embedder",
            "vector_in": "text_embedder",
            "guidance_in": "guidance_embedder",
        },
    ),
)
_FLUX_2 = (
    *_streams("linear_in linear_out"),
    Original(r"single_blocks_(\d+)_linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
    Original(r"single_blocks_(\d+)_linear2", (f"{_SINGLE}.attn.to_out",)),
    *_norms(r"single_blocks_(\d+)_norm", f"{_SINGLE}.attn.norm"),
    *_embedders(
        "time_guidance_embed",
        {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"},
    ),
    *(
        Original(f"{name}_lin", (f"{name}.linear",))
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
)
_Z_IMAGE = (
    *(
        made
        for block in ("layers", "noise_refiner", "context_refiner")
        for made in (
            Original(
                rf"{block}_(\d+)_attention_qkv",
                tuple(f"{block}.{{0}}.attention.to_{one}" for one in "qkv"),
            ),
            Original(rf"{block}_(\d+)_attention_out", (f"{block}.{{0}}.attention.to_out.0",)),
            *(
                Original(
                    rf"{block}_(\d+)_attention_{one}_norm", (f"{block}.{{0}}.attention.norm_{one}",)
                )
                for one in "qk"
            ),
        )
    ),
    Original("x_embedder", ("all_x_embedder.2-1",)),
    Original("final_layer_linear", ("all_final_layer.2-1.linear",)),
    Original("final_layer_adaLN_modulation_1", ("all_final_layer.2-1.adaLN_modulation.1",)),
)

_SD3_STREAMS = {
    "x": (
        "attn.to_{}",
        {
            "attn_proj": "attn.to_out.0",
            "attn2_proj": "attn2.to_out.0",
            "mlp_fc1": "ff.net.0.proj",
            "mlp_fc2": "ff.net.2",
            "adaLN_modulation_1": "norm1.linear",
            "attn_ln_q": "attn.norm_q",
            "attn_ln_k": "attn.norm_k",
            "attn2_ln_q": "attn2.norm_q",
            "attn2_ln_k": "attn2.norm_k",
        },
    ),
    "context": (
        "attn.add_{}_proj",
        {
            "attn_proj": "attn.to_add_out",
            "mlp_fc1": "ff_context.net.0.proj",
            "mlp_fc2": "ff_context.net.2",
            "adaLN_modulation_1": "norm1_context.linear",
            "attn_ln_q": "attn.norm_added_q",
            "attn_ln_k": "attn.norm_added_k",
        },
    ),
}
"""Queries, keys and values of the streams of Stable Diffusion 3's blocks, and the other layers."""


def _stable_diffusion_3() -> tuple[Original, ...]:
    block, made = "transformer_blocks.{0}", list[Original]()
    for stream, (attention, layers) in _SD3_STREAMS.items():
        original = rf"joint_blocks_(\d+)_{stream}_block"
        three = tuple(f"{block}.{attention.format(one)}" for one in "qkv")
        made.append(Original(f"{original}_attn_qkv", three))
        made += [
            Original(f"{original}_{name}", (f"{block}.{layer}",), turned="norm1_context" in layer)
            for name, layer in layers.items()
        ]
    dual = tuple(f"{block}.attn2.to_{one}" for one in "qkv")
    made.append(Original(r"joint_blocks_(\d+)_x_block_attn2_qkv", dual))
    for name, embedder in {"t": "timestep_embedder", "y": "text_embedder"}.items():
        for number, own in enumerate((0, 2), 1):
            layer = f"time_text_embed.{embedder}.linear_{number}"
            made.append(Original(f"{name}_embedder_mlp_{own}", (layer,)))
    return (
        *made,
        Original("x_embedder_proj", ("pos_embed.proj",)),
        Original("final_layer_linear", ("proj_out",)),
        Original("final_layer_adaLN_modulation_1", ("norm_out.linear",), turned=True),
    )


ORIGINAL: Final[Mapping[str, tuple[Original, ...]]] = {
    "Flux2Transformer2DModel": _FLUX_2,
    "FluxTransformer2DModel": _FLUX_1,
    "SD3Transformer2DModel": _stable_diffusion_3(),
    "ZImageTransformer2DModel": _Z_IMAGE,
}
"""Layers of the original code by the diffusers class, as its checkpoint converters map them."""

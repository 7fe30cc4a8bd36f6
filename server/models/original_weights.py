"""Networks with the tensor names of their original code, as in single files.

diffusers' single-file converters rename the tensors; the converter for PixArt is Weft's own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from server.errors import ModelMismatch
from server.models.pixart_names import pixart_as_diffusers
from server.models.prefixes import UNET, own_prefix
from server.models.published_networks import check_published
from server.models.scaled_weights import unscaled

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

__all__ = ["as_diffusers"]

NAMES_SHOWN: Final = 3
ZERO_FOR_REFERENCES: Final = "__index_timestep_zero__"
"""Empty tensor by which ComfyUI's files of Qwen-Image-Edit-2511 state that tokens of reference
images receive the timestep 0; in diffusers, the config states this (``zero_cond_t``)."""

TRANSFORMER: Final = "Transformer2DModel"
"""Suffix of the classes of transformers."""

ORIGINAL: Final = {
    "AutoencoderKL": "encoder.down.0.block.0.conv1.weight",
    "ControlNetModel": "input_blocks.0.0.weight",
    "Flux2Transformer2DModel": "double_blocks.0.img_attn.qkv.weight",
    "FluxTransformer2DModel": "double_blocks.0.img_attn.qkv.weight",
    "PixArtTransformer2DModel": "t_block.1.weight",
    "SD3Transformer2DModel": "joint_blocks.0.x_block.attn.qkv.weight",
    "SanaTransformer2DModel": "x_embedder.proj.weight",
    "UNet2DConditionModel": "input_blocks.0.0.weight",
    "ZImageTransformer2DModel": "x_embedder.weight",
}
"""A tensor of each class that has this name only in the original code."""

PIXART: Final = "PixArtTransformer2DModel"
FLUX: Final = "FluxTransformer2DModel"
NORM_OF_COMFYUI: Final = re.compile(r"\.(query_norm|key_norm)\.weight$")
"""Scales of queries and keys in files saved by ComfyUI since 2026; the converter of FLUX.1 knows
only the authors' name, ``scale``."""

ADDED_CONDITIONS: Final = {
    f"add_embedding.linear_{number}.{kind}": f"label_emb.0.{place}.{kind}"
    for number, place in ((1, 0), (2, 2))
    for kind in ("weight", "bias")
}


def as_diffusers(
    weights: Mapping[str, Tensor], network: Any, called: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rename the weights of a network to diffusers' names, unless they have these names already.

    Args:
        weights: weights of a file, which may also contain other networks.
        network: diffusers network into which they will be loaded.
        called: name of the network, for errors.
        dtype: dtype to which scaled eight-bit floats are converted.

    Raises:
        ModelMismatch: weights in an unsupported format or of another network, or tensors that
            belong to no layer.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    prefix = own_prefix(weights.keys())
    own = {k.removeprefix(prefix): one for k, one in weights.items() if k.startswith(prefix)}
    own = unscaled(own, called, dtype)
    if own.pop(ZERO_FOR_REFERENCES, None) is not None and not network.config.get("zero_cond_t"):
        raise ModelMismatch(
            f"{called} has {ZERO_FOR_REFERENCES}: it was trained on reference images at the "
            "timestep 0, as Qwen-Image-Edit-2511; a folder is needed whose transformer's config "
            "says so by zero_cond_t."
        )
    kind = type(network).__name__
    check_published(own.keys(), kind, called)
    if kind == FLUX:
        own = {NORM_OF_COMFYUI.sub(r".\1.scale", name): tensor for name, tensor in own.items()}
    if ORIGINAL.get(kind) not in own:
        return own
    if kind == "UNet2DConditionModel":
        # Its converter expects the names of a whole checkpoint.
        own = {f"{UNET}{name}": tensor for name, tensor in own.items()}
    try:
        if kind == PIXART:
            return pixart_as_diffusers(own)
        convert: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        made = convert(given := dict(own), config=network.config)
    except (IndexError, RuntimeError, ValueError) as error:
        # Converters assume blocks of each kind and divisible shapes, and that of FLUX.1 assumes its
        # published width.
        raise ModelMismatch(
            f"{called} has original names, but not the blocks or the width of the networks that "
            f"were published under them ({error})."
        ) from None
    if kind.endswith(TRANSFORMER) and given:
        # Converters of transformers remove the tensors they use from the given dictionary.
        raise ModelMismatch(
            f"{called} has tensors that its network does not: "
            f"{', '.join(sorted(given)[:NAMES_SHOWN])}."
        )
    if kind == "ControlNetModel":
        # The converter omits these, which ControlNets of Stable Diffusion XL have.
        made |= {name: own.get(original) for name, original in ADDED_CONDITIONS.items()}
    # Some converters put None in place of a missing tensor.
    return {name: tensor for name, tensor in made.items() if tensor is not None}

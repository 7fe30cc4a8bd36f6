"""Finds the layers of LoRA files by the names that trainers give them.

Trainers write a layer's name as in the model, with their own prefix and with dots or underscores:
written with underscores only, the name identifies the layer. The original code of a U-Net numbers
blocks differently (:mod:`.original_unet`), and that of a transformer has layers that diffusers
splits or names differently (:mod:`.original_layers`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import torch

from server.errors import AdapterMismatch
from server.models.adapters.original_unet import original_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from server.models.adapters.original_layers import Original

__all__ = [
    "DOWN",
    "FACTOR_BIAS",
    "MOVED_BIAS",
    "NORM_BIAS",
    "NORM_WEIGHT",
    "SIZE",
    "SIZE_BLENDED",
    "UP",
    "alpha_of",
    "listed",
    "named",
    "without_vectors",
]

DOWN: Final = "lora_A.weight"
UP: Final = "lora_B.weight"
SIZE: Final = "lora_magnitude_vector"
"""Magnitudes of a DoRA as peft and ai-toolkit write them."""
SIZE_BLENDED: Final = "dora_scale"
"""Magnitudes of a DoRA as LyCORIS writes them, for which a request's weight has another meaning."""
MOVED_BIAS: Final = "diff_b"
"""The change of a bias as LyCORIS and ComfyUI write it."""
FACTOR_BIAS: Final = "lora_B.bias"
"""The change of a bias as peft writes it, which alpha / rank multiplies."""
NORM_WEIGHT: Final = "w_norm"
"""The change of a norm's weight as LyCORIS writes it; ComfyUI writes ``diff``."""
NORM_BIAS: Final = "b_norm"
"""The change of a norm's bias as LyCORIS writes it; ComfyUI writes that of any other layer's."""

ENDINGS: Final[Mapping[str, str]] = {
    DOWN: r"(?:lora_A(?:\.default)?|lora[_.]down|lora_linear_layer\.down)\.weight",
    UP: r"(?:lora_B(?:\.default)?|lora[_.]up|lora_linear_layer\.up)\.weight",
    SIZE: r"lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude",
    SIZE_BLENDED: r"dora_scale",
    MOVED_BIAS: r"diff_b",
    FACTOR_BIAS: r"lora_B(?:\.default)?\.bias",
    # Differences of weights of other layers have been converted to factors before.
    NORM_WEIGHT: r"w_norm|diff",
    NORM_BIAS: r"b_norm",
}
"""Patterns of the endings of tensors' names, by the ending that is used here."""

ENDED: Final = {
    ending: re.compile(rf"(?P<layer>.+)\.(?:{written})") for ending, written in ENDINGS.items()
}
SOURCE: Final = re.compile(r"(?P<layer>.+?)\.(lora[_.]|hada_|lokr_|diff$)")
"""Matches a tensor's name up to the end of the layer's name, which the name of its alpha shares."""

NAMES_SHOWN: Final = 3

PREFIXES: Final = {
    "denoiser": r"(?:lora_unet_|lora_transformer_|lycoris_|(?:model\.)?diffusion_model\.|unet\."
    r"|transformer\.|base_model\.model\.)*",
    "text_encoder": r"(?:lora_te1?_|text_encoder\.|text_encoders\.clip_[lh]\.transformer\.)",
    "text_encoder_2": r"(?:lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.transformer\.)",
}
"""Prefixes that trainers write before the names of a network's layers."""

DENOISERS: Final = ("unet", "transformer")


def alpha_of(name: str) -> str:
    """Name of the alpha tensor of a layer, given another tensor of that layer."""
    match = SOURCE.match(name)
    return f"{match['layer'] if match else name}.alpha"


def without_vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors except those that converters do not know: of DoRA, biases and norms."""
    return {
        name: one
        for name, one in tensors.items()
        if (written := _written(name)) is None or written[1] in (DOWN, UP)
    }


def named(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, tuple[int, ...]]],
    original: Iterable[Original] = (),
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Find the layers that tensors belong to.

    Tensors of a fused layer of the original code are split as diffusers splits the layer.

    Args:
        tensors: tensors of a file, or stand-ins for them.
        layers: shapes of the model's weights, by network and by name.
        original: layers of the original code of the model's transformer.

    Returns:
        The tensors of known layers by network and by ``layer.ending``, with a key of ``ENDINGS``;
        and the other tensors by their names in the file.

    Raises:
        AdapterMismatch: two tensors are the same one of a layer, or one cannot be split; the
            message continues a sentence that begins with the adapter's name.
    """
    spelled = {part: {name.replace(".", "_"): name for name in own} for part, own in layers.items()}
    if "unet" in layers:
        names = original_names(layers["unet"])
        spelled["unet"] |= {original.replace(".", "_"): name for name, original in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    known = set[str]()
    for name, tensor in tensors.items():
        written = _written(name)
        place = _place(written[0], spelled, original) if written else None
        if written is None or place is None:
            others[name] = tensor
            continue
        part, own, known_as = place
        known.add(alpha_of(name))
        shapes = [layers[part].get(layer, (0,)) for layer in own]
        turned = known_as is not None and known_as.turns(own[0], shapes[0])
        pieces = [tensor] * len(own)
        # Magnitudes of inputs have no entry for each output: all layers share them.
        if written[1] != DOWN and tensor.ndim and len(tensor) > 1:
            pieces = _divided(name, tensor, own, shapes, turned=turned)
        for layer, piece in zip(own, pieces, strict=True):
            key = f"{layer}.{written[1]}"
            if key in found.setdefault(part, {}):
                raise AdapterMismatch(f"changes the layer {layer} of {part} twice")
            found[part][key] = piece
    return found, {name: one for name, one in others.items() if name not in known}


def listed(names: Iterable[str]) -> str:
    """The first few names of tensors, shortened, for an error message."""
    known = sorted(names)
    more = f" and {len(known) - NAMES_SHOWN} more" if len(known) > NAMES_SHOWN else ""
    return ", ".join(" ".join(name.split())[:200] for name in known[:NAMES_SHOWN]) + more


def _written(name: str) -> tuple[str, str] | None:
    """The name of a tensor's layer in the file, and the key of ``ENDINGS`` for its ending."""
    for ending, pattern in ENDED.items():
        if match := pattern.fullmatch(name):
            return match["layer"], ending
    return None


def _place(
    written: str, spelled: Mapping[str, Mapping[str, str]], original: Iterable[Original]
) -> tuple[str, tuple[str, ...], Original | None] | None:
    """Network, layers, and the layer of the original code; None if the name is unknown."""
    for part, names in spelled.items():
        pattern = PREFIXES["denoiser" if part in DENOISERS else part]
        begun = re.match(pattern, written)
        if begun is None:
            continue
        flat = written[begun.end() :].replace(".", "_")
        bare = flat.removeprefix("text_model_")
        for spelling in (flat, bare, f"text_model_{bare}"):
            if spelling in names:
                return part, (names[spelling],), None
        if part not in DENOISERS:
            continue
        for one in original:
            if block := re.fullmatch(one.name, flat):
                own = tuple(layer.format(*block.groups()) for layer in one.layers)
                return part, own, one
    return None


def _divided(
    name: str,
    tensor: Tensor,
    layers: tuple[str, ...],
    shapes: Sequence[tuple[int, ...]],
    *,
    turned: bool,
) -> Iterable[Tensor]:
    """Split a tensor with one entry per output among the layers that its layer consists of here."""
    if turned:
        return [torch.cat(tensor.chunk(2)[::-1])]
    outs = [shape[0] for shape in shapes]
    if len(outs) == 1 or not all(outs):
        return [tensor] * len(outs)
    if sum(outs) != len(tensor):
        raise AdapterMismatch(
            f"has {len(tensor)} outputs in {listed([name])}, whose layer is {', '.join(layers)} "
            f"in this model, with {sum(outs)} outputs together"
        )
    return tensor.split(outs)

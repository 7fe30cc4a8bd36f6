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
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from server.models.adapters.original_layers import Original

__all__ = ["alpha_of", "biases_of", "magnitudes_of", "named", "without_vectors", "written_layer"]

FACTOR: Final = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A(\.default)?|lora[_.]down|lora_linear_layer\.down)"
    r"|lora_B(\.default)?|lora[_.]up|lora_linear_layer\.up)\.weight"
)
SOURCE: Final = re.compile(r"(?P<layer>.+?)\.(lora[_.]|hada_|lokr_|diff$)")
"""Name of a tensor up to the layer's, which its alpha has too."""

MAGNITUDE: Final = re.compile(
    r"(?P<layer>.+)\.(?:(?P<blended>dora_scale)"
    r"|lora_magnitude_vector(\.default)?(\.weight)?|magnitude)"
)
"""The sizes of a DoRA by LyCORIS' name, and by those of peft and ai-toolkit, which mean another
thing by a weight."""

BIAS: Final = re.compile(r"(?P<layer>.+)\.(?:(?P<whole>diff_b)|lora_B(\.default)?\.bias)")
"""The change of a bias: LyCORIS' and ComfyUI's, and that of peft, which its scale multiplies."""

PREFIXES: Final = {
    "denoiser": r"(?:lora_unet_|lora_transformer_|lycoris_|(?:model\.)?diffusion_model\.|unet\."
    r"|transformer\.|base_model\.model\.)*",
    "text_encoder": r"(?:lora_te1?_|text_encoder\.|text_encoders\.clip_[lh]\.transformer\.)",
    "text_encoder_2": r"(?:lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.transformer\.)",
}
"""Prefixes that trainers write before the names of a network's layers."""

DENOISERS: Final = ("unet", "transformer")


def alpha_of(name: str) -> str:
    """The tensor with the alpha of a layer, by the name of another tensor of that layer."""
    return f"{written_layer(name)}.alpha"


def written_layer(name: str) -> str:
    """How a file spells the layer that a tensor of it is of."""
    match = SOURCE.match(name)
    return match["layer"] if match else name


def magnitudes_of(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The tensors that hold sizes of DoRA, and whether they are blended, by the written layer.

    Args:
        names: of all tensors of a file.
    """
    matches = filter(None, map(MAGNITUDE.fullmatch, names))
    return {match["layer"]: (match[0], bool(match["blended"])) for match in matches}


def biases_of(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The tensors that change biases, and whether they do so as they are, by the written layer.

    Args:
        names: of all tensors of a file.
    """
    matches = filter(None, map(BIAS.fullmatch, names))
    return {match["layer"]: (match[0], bool(match["whole"])) for match in matches}


def without_vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a file but sizes of DoRA and changes of biases, unknown to converters."""
    return {
        name: one
        for name, one in tensors.items()
        if not MAGNITUDE.fullmatch(name) and not BIAS.fullmatch(name)
    }


def named(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, tuple[int, ...]]],
    original: Iterable[Original] = (),
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors of layers that are known by name, under peft's names by network; and the others.

    Args:
        tensors: of a file, or stand-ins for them.
        layers: shapes of the weights that a model has, by network and by name.
        original: layers of the original code of the model's transformer.

    Raises:
        AdapterMismatch: two tensors are the same factor of a layer; the sentence goes on after the
            adapter's name.
    """
    spelled = {part: {name.replace(".", "_"): name for name in own} for part, own in layers.items()}
    if "unet" in layers:
        names = original_names(layers["unet"])
        spelled["unet"] |= {original.replace(".", "_"): name for name, original in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    known = set[str]()
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        place = _place(match["layer"], spelled, original) if match else None
        if match is None or place is None:
            others[name] = tensor
            continue
        part, own, known_as = place
        known.add(alpha_of(name))
        factor = "A" if match["down"] else "B"
        shapes = [layers[part].get(layer, (0,)) for layer in own]
        turned = known_as is not None and known_as.turns(own[0], shapes[0])
        pieces = [tensor] * len(own) if match["down"] else _divided(tensor, shapes, turned=turned)
        for layer, piece in zip(own, pieces, strict=True):
            key = f"{layer}.lora_{factor}.weight"
            if key in found.setdefault(part, {}):
                raise AdapterMismatch(f"changes the layer {layer} of {part} twice")
            found[part][key] = piece
    return found, {name: one for name, one in others.items() if name not in known}


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


def _divided(up: Tensor, shapes: list[tuple[int, ...]], *, turned: bool) -> Iterable[Tensor]:
    """The second factor of each of the layers that a layer of the original code is."""
    if turned:
        return [torch.cat(up.chunk(2)[::-1])]
    outs = [shape[0] for shape in shapes]
    if len(outs) == 1 or sum(outs) != len(up):
        return [up] * len(outs)
    return up.split(outs)

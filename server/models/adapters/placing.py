"""Determines which layers of a model a LoRA file changes, from the file's header only.

Layers that a file names as the model does are found by name, all others by diffusers' own
converters. Both are given tensors on the meta device instead of the file's, so that a file is
checked before its weights are read. Tensors that match no layer are refused by name: ignoring them
would generate a different image from the one that the file's author saw.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from server.errors import AdapterMismatch
from server.models.adapters.conversion import CONVERTERS, TrackedTensor, converted
from server.models.adapters.lycoris import as_low_rank
from server.models.adapters.naming import (
    DOWN,
    ENDINGS,
    UP,
    alpha_of,
    listed,
    named,
    without_vectors,
)
from server.models.adapters.norms import PlacedNorm, is_norm, norm_of
from server.models.adapters.original_layers import ORIGINAL, Original
from server.models.adapters.peft_config import PeftConfig
from server.models.adapters.target_layer import TargetLayer
from server.models.adapters.vectors import PlacedBias, PlacedMagnitude, bias_of, magnitude_of
from server.models.gguf.layers import conv_shape
from server.models.streamed import at_rest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from server.models.adapters.stack import Layer

__all__ = [
    "Header",
    "Placed",
    "PlacedChanges",
    "Target",
    "place",
]

UNSUPPORTED = {
    ".set_weight": "replaces whole weights",
    ".oft_": "is an OFT",
    ".a1.weight": "is a GLoRA",
    ".on_input": "is an (IA)^3",
    ".lambda_layer": "is a T-LoRA",
    "bundle_emb.": "brings embeddings",
    "lora_te3_": "changes T5",
    "lora_controlnet": "is a control LoRA",
    "lllite_": "is a ControlNet LLLite",
}
"""Kinds of unsupported files, by a part of their tensors' names."""

NAMED = re.compile(rf"(?P<layer>.+?)\.(?P<ending>{'|'.join(map(re.escape, ENDINGS))})")
NOT_BY_ROWS = "resolution_embedder"
"""Part of PixArt-alpha's transformer that takes height and width as two entries per row."""


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """The contents of a file's header, and its scalars.

    Attributes:
        shapes: shapes of its tensors, by name.
        alphas: values of the tensors that are single numbers, by name.
        metadata: text entries by name.
        config: config beside the file; None where there is none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    config: PeftConfig | None = None

    def config_of(self, part: str) -> PeftConfig:
        """The config of the adapter of a network.

        Args:
            part: name of the network in a model folder.

        Raises:
            AdapterMismatch: it cannot be read.
        """
        return self.config or PeftConfig.of_metadata(self.metadata, part)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The parts of a model that can be adapted.

    Attributes:
        model: name of the model.
        layers: shapes of the weights of its linear layers, convolutions and norms, by the network's
            name in a model folder and by the layer's name in that network.
        unet_config: config of its U-Net, from which converters derive block numbers; None where it
            has none.
        converter: converter for its transformer's files; None for U-Nets.
        original: layers of the original code of its transformer.
        networks: networks that have the layers, by their names in a model folder.
    """

    model: str
    layers: Mapping[str, Mapping[str, tuple[int, ...]]]
    unet_config: Any
    converter: str | None = None
    original: tuple[Original, ...] = ()
    networks: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    @classmethod
    def of(cls, model: str, networks: Mapping[str, nn.Module]) -> Target:
        """Describe some networks of a model.

        Args:
            model: name of the model.
            networks: networks by their names in a model folder.
        """
        layers = {
            part: {
                name: shape
                for name, layer in network.named_modules()
                if NOT_BY_ROWS not in name.split(".") and (shape := _shape_of(layer)) is not None
            }
            for part, network in networks.items()
        }
        transformer = type(networks.get("transformer")).__name__
        return cls(
            model,
            layers,
            getattr(networks.get("unet"), "config", None),
            CONVERTERS.get(transformer),
            ORIGINAL.get(transformer, ()),
            networks,
        )

    def layer(self, part: str, name: str, device: torch.device) -> Layer:
        """A layer that adapters may change, in a form that can be read while ticks run.

        Args:
            part: name of its network in a model folder.
            name: name of the layer in that network.
            device: device of the network; if the layer is streamed, a copy is moved there.
        """
        return at_rest(self.networks[part], name, device)

    def converted(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, dict[str, Tensor]]:
        """Convert the tensors of a file, by network and by the layer's name in the model.

        Names end in a key of ``naming.ENDINGS``; changes of weights are products of two factors.

        Args:
            tensors: tensors of the file, or stand-ins for them.
            dtype: dtype of factors that are computed from LyCORIS' tensors.

        Raises:
            AdapterMismatch: the names are in no known format.
        """
        found, others = named(as_low_rank(tensors, dtype), self.layers, self.original)
        others = without_vectors(others)
        if others or not found:
            for part, own in converted(others, self.converter, self.unet_config).items():
                layers = self.layers.get(part, {})
                renamed = {_as_in(layers, name): one for name, one in own.items()}
                if twice := renamed.keys() & found.get(part, {}).keys():
                    raise AdapterMismatch(f"changes {listed(twice)} of {part} twice")
                found.setdefault(part, {}).update(renamed)
        return {
            part: {name: _shaped(one, name, self.layers.get(part, {})) for name, one in own.items()}
            for part, own in found.items()
        }


@dataclass(frozen=True, slots=True)
class Placed:
    """The change of one layer.

    Attributes:
        shapes: shapes of both factors.
        scale: factor on their product, alpha / rank.
        magnitude: magnitudes of a DoRA; None for any other adapter.
        bias: change of the layer's bias; None where it is not changed.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    scale: float
    magnitude: PlacedMagnitude | None
    bias: PlacedBias | None

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.shapes[0][0]

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the names of the layer's tensors, keys of ``naming.ENDINGS``."""
        vectors = (one.ending for one in (self.magnitude, self.bias) if one is not None)
        return DOWN, UP, *vectors


class PlacedChanges(NamedTuple):
    """The changes of a file.

    Attributes:
        parts: changes of layers, by the names of network and layer.
        norms: changes of norms, by the names of network and norm.
    """

    parts: Mapping[str, Mapping[str, Placed]]
    norms: Mapping[str, Mapping[str, PlacedNorm]]


def _shape_of(layer: nn.Module) -> tuple[int, ...] | None:
    """Shape of a layer's weight before quantization; None if adapters cannot change the layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv2d):
        return conv_shape(layer) if layer.groups == 1 else None
    return tuple(layer.weight.shape) if is_norm(layer) else None


def place(header: Header, target: Target) -> PlacedChanges:
    """Find what a file changes.

    Args:
        header: header of a file with peft's names as diffusers saves them, diffusers' older names,
            kohya's, LyCORIS' for LoRA of convolutions (LoCon), or others that diffusers converts.
        target: the model.

    Raises:
        AdapterMismatch: the file changes nothing, is of an unsupported kind, or has tensors that
            match no layer of the model; the message continues a sentence that begins with the
            adapter's name.
    """
    for part, what in UNSUPPORTED.items():
        if names := [name for name in header.shapes if part in name]:
            raise AdapterMismatch(f"{what} ({listed(names)}), which is not supported")
    tracked: dict[str, Tensor] = {
        name: TrackedTensor.of(name, shape) for name, shape in header.shapes.items()
    }
    tracked |= {name: torch.tensor(value) for name, value in header.alphas.items()}
    placed: dict[str, dict[str, Placed]] = {}
    norms: dict[str, dict[str, PlacedNorm]] = {}
    used: set[str] = set()
    for part, layer, own in _by_layer(target.converted(tracked)):
        if not {DOWN, UP} & own.keys():
            if norm := _norm(target, part, layer, own):
                norms.setdefault(part, {})[layer] = norm
                used |= _sources(own, norm)
            continue
        if not {DOWN, UP} <= own.keys():
            alone = own[DOWN] if DOWN in own else own[UP]
            raise AdapterMismatch(f"has {listed(alone.sources)} without its other factor")
        down, up = own[DOWN], own[UP]
        shapes = tuple(down.shape), tuple(up.shape)
        _check(target, part, layer, shapes)
        config = header.config_of(part)
        scale = _scale(header, config, layer, down, shapes[0][0])
        where = f"the layer {layer} of {part}"
        matched = TargetLayer(where, target.layers[part][layer], target.model)
        magnitude, bias = magnitude_of(own, matched), bias_of(own, matched, scale=scale)
        if magnitude is None and config.is_dora:
            raise AdapterMismatch(
                f"is a DoRA ({config.source} says so) without the lora_magnitude_vector of "
                f"{layer[:120]}"
            )
        change = Placed(shapes, scale, magnitude, bias)
        placed.setdefault(part, {})[layer] = change
        used |= _sources(own, change)
    used |= {alpha_of(name) for name in used} & header.alphas.keys()
    if unused := [name for name in tracked if name not in used]:
        raise AdapterMismatch(f"has tensors that are not understood: {listed(unused)}")
    if not placed and not norms:
        raise AdapterMismatch("has no tensors")
    return PlacedChanges(placed, norms)


def _norm(
    target: Target, part: str, layer: str, own: Mapping[str, TrackedTensor]
) -> PlacedNorm | None:
    weight = target.layers.get(part, {}).get(layer, ())
    return norm_of(own, TargetLayer(f"{layer} of {part}", weight, target.model))


def _sources(own: Mapping[str, TrackedTensor], change: Placed | PlacedNorm) -> frozenset[str]:
    """Names of the tensors of a file that a change uses."""
    return frozenset[str]().union(*(own[ending].sources for ending in change.endings))


def _as_in(known: Mapping[str, Any], name: str) -> str:
    """A text encoder's layer name with or without ``text_model.``, as in this model."""
    bare = name.removeprefix("text_model.")
    layer = bare.partition(".lora_")[0]
    return f"text_model.{bare}" if f"text_model.{layer}" in known else bare


def _shaped(factor: Tensor, name: str, layers: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Reshape a matrix to the factor of a convolution, if its layer is one."""
    match = NAMED.fullmatch(name)
    weight = layers.get(match["layer"], ()) if match else ()
    if match is None or match["ending"] not in (DOWN, UP) or len(weight) != 4 or factor.ndim != 2:
        return factor
    own = weight[1:] if match["ending"] == DOWN else (factor.shape[1], 1, 1)
    return factor.reshape(-1, *own) if factor[0].numel() == prod(own) else factor


def _by_layer(
    state: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[tuple[str, str, dict[str, TrackedTensor]]]:
    """Network, layer, and its tensors by the endings of their names."""
    for part, tensors in state.items():
        layers: dict[str, dict[str, TrackedTensor]] = {}
        for name, tensor in tensors.items():
            match = NAMED.fullmatch(name)
            if match and isinstance(tensor, TrackedTensor):
                layers.setdefault(match["layer"], {})[match["ending"]] = tensor
        for layer, own in layers.items():
            yield part, layer, own


def _check(
    target: Target, part: str, layer: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    if part not in target.layers:
        allowed = ", ".join(target.layers) or "nothing"
        raise AdapterMismatch(
            f"changes {part}; of model {target.model!r} adapters can change {allowed}"
        )
    weight = target.layers[part].get(layer)
    if weight is None:
        raise AdapterMismatch(
            f"changes the layer {layer[:120]} of {part}, which model {target.model!r} does not have"
        )
    down, up = shapes
    rank = down[0] if down else 0
    ones = (1,) * (len(weight) - 2)
    if rank == 0 or down != (rank, *weight[1:]) or up != (weight[0], rank, *ones):
        raise AdapterMismatch(
            f"has factors of the shapes {list(down)} and {list(up)} for the layer {layer} of "
            f"{part}, whose weight has the shape {list(weight)} in model {target.model!r}"
        )


def _scale(header: Header, config: PeftConfig, layer: str, down: TrackedTensor, rank: int) -> float:
    """Alpha / rank: from a tensor in kohya's files, from the config in peft's, otherwise 1.

    A converter that created new factors has already multiplied it into them.
    """
    [source, *_] = down.sources
    if (alpha := header.alphas.get(alpha_of(source))) is not None:
        return alpha / rank if down.kept else 1.0
    written = alpha_of(source).removesuffix(".alpha").removeprefix("base_model.model.")
    return config.scale({layer, written}, rank)

"""Layers whose weights stay in quantized blocks, as in a GGUF file.

A layer dequantizes its weight each time it runs, so a network takes as much memory as its file plus
its largest dequantized weight. Per-row additions to a layer's output, such as adapters, work as for
other layers.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from server.errors import ModelMismatch
from server.models.gguf.blocks import dequantized
from server.models.gguf.formats import FORMATS, stays_in_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BlockConv2d",
    "BlockLayer",
    "BlockLinear",
    "BlockRows",
    "conv_shape",
    "in_shape",
    "keep_in_blocks",
    "kinds_of",
    "whole_shape",
]


class BlockLinear(nn.Linear):
    """A linear layer with a weight in blocks.

    Args:
        layer: the layer that it replaces.
        rows: its weight.
        compute_dtype: dtype of its computations; diffusers' transformers read it by this name.
    """

    def __init__(self, layer: nn.Linear, rows: BlockRows, compute_dtype: torch.dtype) -> None:
        bias = layer._parameters["bias"] is not None
        super().__init__(layer.in_features, layer.out_features, bias=bias, device="meta")
        self.kind = rows.kind
        self.compute_dtype = compute_dtype
        self.weight = _empty(rows)

    def restored(self) -> Tensor:
        """The dequantized weight, ``[out, in]``."""
        numbers = dequantized(self.weight, self.kind, self.compute_dtype)
        return numbers.view(self.out_features, self.in_features)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.restored(), self.bias)


class BlockConv2d(nn.Conv2d):
    """A convolution with a weight in blocks.

    Args:
        layer: the layer that it replaces.
        rows: its weight.
        compute_dtype: dtype of its computations.
    """

    def __init__(self, layer: nn.Conv2d, rows: BlockRows, compute_dtype: torch.dtype) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            _pair(layer.dilation),
            layer.groups,
            bias=layer._parameters["bias"] is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        self.kind = rows.kind
        self.compute_dtype = compute_dtype
        self.weight = _empty(rows)

    def restored(self) -> Tensor:
        """The dequantized weight, ``[out, in, height, width]``."""
        numbers = dequantized(self.weight, self.kind, self.compute_dtype)
        return numbers.view(conv_shape(self))

    @override
    def forward(self, input: Tensor) -> Tensor:
        # The output must have the memory format of the input.
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        weight = self.restored().contiguous(memory_format=layout)
        return self._conv_forward(input, weight, self.bias)


BlockLayer: TypeAlias = "BlockLinear | BlockConv2d"


class BlockRows(Tensor):
    """Bytes of blocks, ``[..., bytes of a row]``, that keep their format while being converted.

    Converters from other naming schemes slice, reorder and concatenate rows, which leaves blocks
    intact.

    Attributes:
        kind: format of the blocks, a name in ``FORMATS``.
        whole: shape of the dequantized numbers. After slicing, reordering or concatenation it is
            derived from the shape of the bytes.
    """

    kind: str
    whole: tuple[int, ...]

    @staticmethod
    def of(rows: Tensor, kind: str, whole: tuple[int, ...] | None = None) -> BlockRows:
        """Wrap the bytes of blocks of one format.

        Args:
            rows: bytes of whole blocks.
            kind: format of the blocks.
            whole: shape of the dequantized numbers; by default derived from the shape of ``rows``.
        """
        made = rows.as_subclass(BlockRows)
        made._describe(kind, whole)
        return made

    def _describe(self, kind: str, whole: tuple[int, ...] | None = None) -> None:
        self.kind = kind
        *rows, nbytes = self.shape
        self.whole = whole or (*rows, FORMATS[kind].row_numbers(nbytes))

    def plain(self) -> Tensor:
        """The bytes as an ordinary tensor."""
        return self.data.as_subclass(Tensor)

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        parts = made if isinstance(made, tuple | list) else (made,)
        if any(type(one) is BlockRows for one in parts):
            kind = _one_kind(args)
            for one in parts:
                if isinstance(one, BlockRows):
                    one._describe(kind)
        return made


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor's numbers, whether or not it is in blocks."""
    return tensor.whole if isinstance(tensor, BlockRows) else tuple(tensor.shape)


def in_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape a tensor if its shape differs only in dimensions of size 1; else return it as is.

    A GGUF file loses leading dimensions of size 1 unless its writer took care to keep them, and
    stable-diffusion.cpp appends some at the end.
    """
    own = whole_shape(tensor)
    if own == shape or [one for one in own if one != 1] != [one for one in shape if one != 1]:
        return tensor
    if isinstance(tensor, BlockRows):
        return BlockRows.of(tensor.plain(), tensor.kind, shape)
    return tensor.reshape(shape)


def conv_shape(layer: nn.Conv2d) -> tuple[int, ...]:
    """The shape of a convolution's weight, whether or not it is in blocks."""
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def keep_in_blocks(network: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Prepare a network for loading weights of which some are in blocks.

    Layers whose weight stays in blocks are replaced; other tensors in blocks are dequantized.

    Args:
        network: network on the meta device, with parameters of the weights' shapes.
        weights: its weights by name; changed in place.
        dtype: dtype of its computations.
    """
    for name, rows in weights.items():
        if not isinstance(rows, BlockRows):
            continue
        owner = name.rpartition(".")[0]
        layer, stays = network.get_submodule(owner), stays_in_blocks(name, rows.whole)
        weights[name] = rows.plain()
        if stays and type(layer) is nn.Linear:
            network.set_submodule(owner, BlockLinear(layer, rows, dtype))
        elif stays and type(layer) is nn.Conv2d:
            network.set_submodule(owner, BlockConv2d(layer, rows, dtype))
        else:
            weights[name] = dequantized(rows.plain(), rows.kind, dtype).reshape(rows.whole)


def kinds_of(network: nn.Module) -> list[str]:
    """Block formats in a network, that of the most weights first; empty if it has none."""
    counts: dict[str, int] = {}
    for layer in network.modules():
        if isinstance(layer, BlockLinear | BlockConv2d):
            *rows, nbytes = layer.weight.shape
            numbers = prod(rows) * FORMATS[layer.kind].row_numbers(nbytes)
            counts[layer.kind] = counts.get(layer.kind, 0) + numbers
    return sorted(counts, key=lambda kind: -counts[kind])


def _empty(rows: BlockRows) -> nn.Parameter:
    """Placeholder into which the weight of a layer is loaded."""
    empty = torch.empty(rows.shape, dtype=torch.uint8, device="meta")
    return nn.Parameter(empty, requires_grad=False)


def _pair(of: tuple[int, ...]) -> tuple[int, int]:
    first, second = of
    return first, second


def _one_kind(args: Sequence[Any]) -> str:
    flat = [one for arg in args for one in (arg if isinstance(arg, tuple | list) else (arg,))]
    kinds = {
        one.kind if isinstance(one, BlockRows) else "plain"
        for one in flat
        if isinstance(one, Tensor)
    }
    if len(kinds) != 1:
        raise ModelMismatch(
            f"weights of the types {', '.join(sorted(kinds))} would stand in one layer, which must "
            "be of one type."
        )
    return kinds.pop()

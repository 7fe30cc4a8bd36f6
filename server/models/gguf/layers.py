"""Linear layers whose weights stay in blocks, as a GGUF file has them.

A layer restores its weight each time it runs, so a network takes as much memory as its file and the
largest of its weights. What is added to the output of a layer row by row, as adapters are, is added
as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from server.errors import ModelMismatch
from server.models.gguf.blocks import dequantized
from server.models.gguf.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BlockLinear", "BlockRows", "keep_in_blocks", "kinds_of", "whole_shape"]


class BlockLinear(nn.Linear):
    """A linear layer with a weight in blocks.

    Args:
        layer: in whose place it stands.
        kind: of the blocks, a name in ``FORMATS``.
        compute_dtype: that it computes in, under the name by which transformers of diffusers ask.
    """

    def __init__(self, layer: nn.Linear, kind: str, compute_dtype: torch.dtype) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=layer._parameters["bias"] is not None,
            device="meta",
        )
        self.kind = kind
        self.compute_dtype = compute_dtype
        width = FORMATS[kind].row_bytes(layer.in_features)
        empty = torch.empty(layer.out_features, width, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)

    @override
    def forward(self, input: Tensor) -> Tensor:
        weight = dequantized(self.weight, self.kind, self.compute_dtype)
        return F.linear(input, weight, self.bias)


class BlockRows(Tensor):
    """Bytes of blocks, ``[..., bytes of a row]``, that know their kind while they are renamed.

    Converters of names cut, order and join rows, which leaves blocks as they are.

    Attributes:
        kind: of the blocks, a name in ``FORMATS``.
    """

    kind: str

    @staticmethod
    def of(rows: Tensor, kind: str) -> BlockRows:
        """Rows of a kind."""
        made = rows.as_subclass(BlockRows)
        made.kind = kind
        return made

    def plain(self) -> Tensor:
        """The bytes as any other tensor."""
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
                    one.kind = kind
        return made


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor's numbers, whether or not they are in blocks."""
    if not isinstance(tensor, BlockRows):
        return tuple(tensor.shape)
    return *tensor.shape[:-1], FORMATS[tensor.kind].row_numbers(tensor.shape[-1])


def keep_in_blocks(network: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Prepare a network for weights of which some are in blocks.

    Linear layers whose weight is in blocks are replaced, and keep it so; other tensors in blocks
    are restored.

    Args:
        network: without memory for its weights, with the shapes that the weights have.
        weights: of it by name; changed in place.
        dtype: that it computes in.
    """
    for name, rows in weights.items():
        if not isinstance(rows, BlockRows):
            continue
        plain, kind = rows.plain(), rows.kind
        owner, _, own = name.rpartition(".")
        layer = network.get_submodule(owner)
        if type(layer) is nn.Linear and own == "weight":
            network.set_submodule(owner, BlockLinear(layer, kind, dtype))
            weights[name] = plain
        else:
            weights[name] = dequantized(plain, kind, dtype)


def kinds_of(network: nn.Module) -> list[str]:
    """The kinds of blocks in a network, that of most weights first; empty where it has none."""
    counts: dict[str, int] = {}
    for layer in network.modules():
        if isinstance(layer, BlockLinear):
            numbers = layer.in_features * layer.out_features
            counts[layer.kind] = counts.get(layer.kind, 0) + numbers
    return sorted(counts, key=lambda kind: -counts[kind])


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

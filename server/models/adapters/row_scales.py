"""Factors on the part of a layer's output that its own weight contributes, for some rows.

They stay in float32 whatever the layer's dtype: many are closer to 1 than bfloat16 can resolve, and
would round to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.adapters.adapted_rows import AdaptedRows
    from server.models.adapters.stack import Layer

__all__ = ["InputScales", "OutputScales"]


@dataclass(frozen=True, slots=True, eq=False)
class OutputScales:
    """Factors on the outputs of a layer without its bias, and changes of the bias.

    Attributes:
        rows: rows of the forward pass.
        factor: ``[rows, 1, out]``, float32.
        shift: offset that keeps the bias unscaled and includes its change, ``[rows, 1, out]``,
            float32; None for nothing.
    """

    rows: AdaptedRows
    factor: Tensor
    shift: Tensor | None

    @classmethod
    def of(
        cls, rows: AdaptedRows, factor: Tensor, layer: Layer, biases: Tensor | None = None
    ) -> OutputScales:
        """Compute factors and offsets for a layer.

        Args:
            rows: rows of the forward pass.
            factor: ``[rows, out]``, float32.
            layer: the layer.
            biases: changes of its bias, ``[rows, out]``, float32; None for nothing.
        """
        shift = biases
        if layer.bias is not None:
            kept = layer.bias.to(factor.device, torch.float32) * (1 - factor)
            shift = kept if shift is None else kept + shift
        return cls(rows, factor[:, None], None if shift is None else shift[:, None])

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, in bytes."""
        return self.factor.nbytes + (0 if self.shift is None else self.shift.nbytes)

    def scale(self, tokens: Tensor) -> None:
        """Scale the output of the layer.

        Args:
            tokens: ``[all rows, tokens, out]``; changed in place.
        """
        made = self.rows.of(tokens).mul_(self.factor)
        if self.shift is not None:
            made.add_(self.shift)
        if isinstance(self.rows.where, torch.Tensor):
            tokens.index_copy_(0, self.rows.where, made)


@dataclass(frozen=True, slots=True, eq=False)
class InputScales:
    """Factors on the inputs of a layer.

    Attributes:
        rows: rows of the forward pass.
        factor: ``[rows, in]``, float32.
    """

    rows: AdaptedRows
    factor: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of its factors, in bytes."""
        return self.factor.nbytes

    def scaled(self, layer: Layer, x: Tensor) -> Tensor:
        """Copy the layer's input, with those rows scaled.

        Args:
            layer: the layer.
            x: its input, for all rows.
        """
        where, factor, ones = self.rows.where, self.factor, (1,) * (x.ndim - 2)
        if isinstance(layer, torch.nn.Conv2d):
            factor = factor.view(*factor.shape, *ones)
        else:
            factor = factor.view(len(factor), *ones, -1)
        # The clone keeps the memory layout, on which the rounding of products depends.
        made = x.clone()
        scaled = self.rows.of(made).mul_(factor)
        if isinstance(where, torch.Tensor):
            made.index_copy_(0, where, scaled)
        return made

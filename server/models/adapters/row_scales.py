"""Factors on what a layer's own weight makes of some rows of a forward.

They stay in float32 whatever the layer's type: many are nearer to 1 than the next number of
bfloat16 is, and rounded to it they would be 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.adapters.stack import AdaptedRows, Layer

__all__ = ["InputScales", "OutputScales"]


@dataclass(frozen=True, slots=True, eq=False)
class OutputScales:
    """Factors on the outputs of a layer without its bias, and changes of that.

    Attributes:
        rows: of the forward.
        factor: ``[rows, 1, out]``, float32.
        shift: what leaves the bias as it is, or makes it what it is to be, ``[rows, 1, out]``,
            float32; None for nothing.
    """

    rows: AdaptedRows
    factor: Tensor
    shift: Tensor | None

    @classmethod
    def of(
        cls, rows: AdaptedRows, factor: Tensor, layer: Layer, biases: Tensor | None = None
    ) -> OutputScales:
        """Those of a layer.

        Args:
            rows: of the forward.
            factor: ``[rows, out]``, float32.
            layer: that is scaled.
            biases: what is added to its bias, ``[rows, out]``, float32; None for nothing.
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
        """Scale what the layer has put out.

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
        rows: of the forward.
        factor: ``[rows, in]``, float32.
    """

    rows: AdaptedRows
    factor: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of its factors, in bytes."""
        return self.factor.nbytes

    def scaled(self, layer: Layer, x: Tensor) -> Tensor:
        """A copy of the layer's input in which those rows are scaled.

        Args:
            layer: that is scaled.
            x: its input, of all rows.
        """
        where, factor, ones = self.rows.where, self.factor, (1,) * (x.ndim - 2)
        if isinstance(layer, torch.nn.Conv2d):
            factor = factor.view(*factor.shape, *ones)
        else:
            factor = factor.view(len(factor), *ones, -1)
        # In the layout that it has without factors, by which products round their sums.
        made = x.clone()
        scaled = self.rows.of(made).mul_(factor)
        if isinstance(where, torch.Tensor):
            made.index_copy_(0, where, scaled)
        return made

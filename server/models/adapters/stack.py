"""Stacks the changes of one layer over some rows for one batch of matrix products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from server.models.adapters.convolution import convolve_by_products, multiplies, turned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.models.adapters.adapted_rows import AdaptedRows
    from server.models.adapters.adapter import LowRank

__all__ = ["Changes", "Layer", "Stack", "longest_run", "stacked"]

Layer: TypeAlias = "nn.Linear | nn.Conv2d"

Changes: TypeAlias = "list[tuple[LowRank, float]]"
"""All changes of a layer in one row, with their weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The stacked factors of a layer's changes; all changes of a row are one product.

    Attributes:
        rows: rows of the forward pass.
        down: ``[entries, rank, in]``. For a convolution that reaches beyond a single cell, in the
            form of ``convolution.turned``, or a kernel ``[rank, in, height, width]`` per entry.
        up: ``[entries, out, rank]``, multiplied by the weights.
    """

    rows: AdaptedRows
    down: Tensor | list[Tensor]
    up: Tensor

    def add(self, layer: Layer, x: Tensor, tokens: Tensor) -> None:
        """Add the changes to the layer's output.

        Args:
            layer: the layer.
            x: its input, for all rows.
            tokens: its output in memory order, ``[all rows, tokens, out]``; changed in place.
        """
        where, down, up = self.rows.where, self._down(layer, self.rows.of(x)), self.up.mT
        own = self.rows.of(tokens)
        entries = own.view(len(up), -1, own.shape[-1])
        if not isinstance(where, torch.Tensor):
            entries.baddbmm_(down, up)
            return
        count = self.rows.count
        made = torch.baddbmm(entries, down, up).view(own.shape)
        tokens.index_copy_(0, where[:count], made[:count])

    def _down(self, layer: Layer, x: Tensor) -> Tensor:
        """Apply the first factors to the input of these rows, ``[entries, tokens, rank]``."""
        if not isinstance(self.down, torch.Tensor):
            made = self._convolved(layer, x, self.down)
        elif reaches(layer):
            made = convolve_by_products(layer, x, self.down)
        else:
            x = x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else x
            return torch.bmm(x.reshape(len(self.up), -1, x.shape[-1]), self.down.mT)
        return made.permute(0, 2, 3, 1).reshape(len(self.up), -1, self.up.shape[-1])

    def _convolved(self, layer: Any, x: Tensor, kernels: list[Tensor]) -> Tensor:
        # Run by run: on a CPU, a grouped convolution takes up to five times as long.
        conv: Any = F.conv2d
        reach = layer.stride, layer.padding, layer.dilation
        runs = zip(x.split(self.rows.run), kernels, strict=True)
        return torch.cat([conv(own, kernel, None, *reach) for own, kernel in runs])


def stacked(
    layer: Layer,
    rows: AdaptedRows,
    changes: Sequence[Changes],
    weights: Tensor,
    *,
    by_products: bool,
) -> Stack:
    """Stack the factors of a layer's changes.

    Args:
        layer: the layer.
        rows: rows of the forward pass.
        changes: changes of each entry.
        weights: weights of each entry, ``[entries, 1, rank]``: the weight of each change, repeated
            by its rank, padded with 0 to the largest rank of all entries.
        by_products: whether to compute convolutions as matrix products where possible.
    """
    rank = weights.shape[-1]
    down = [_filled([change.down for change, _ in own], 0, rank) for own in changes]
    up = torch.stack([_filled([change.up for change, _ in own], 1, rank) for own in changes])
    up.mul_(weights)
    if not reaches(layer):
        return Stack(rows, torch.stack(down).flatten(2), up)
    if by_products and multiplies(layer):
        # In an entry with several rows, neighboring cells are not adjacent in memory.
        single = replace(rows, run=1)
        kernels = turned(torch.stack(down)).repeat_interleave(rows.run, 0)
        return Stack(single, kernels, up.repeat_interleave(rows.run, 0))
    return Stack(rows, down, up)


def reaches(layer: Layer) -> TypeGuard[nn.Conv2d]:
    """Whether a layer's output at a cell depends on other cells as well."""
    return isinstance(layer, nn.Conv2d) and not (
        layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    )


def _filled(factors: list[Tensor], axis: int, rank: int) -> Tensor:
    """Concatenate factors along their ranks, padded with zeros."""
    whole = factors[0] if len(factors) == 1 else torch.cat(factors, axis)
    missing = rank - whole.shape[axis]
    if not missing:
        return whole
    return F.pad(whole, (*(0, 0) * (whole.ndim - 1 - axis), 0, missing))


def longest_run(changes: Sequence[object]) -> int:
    """The largest run length that divides the lengths of all runs of equal changes."""
    run, begun = 0, 0
    for row in range(1, len(changes) + 1):
        if row == len(changes) or changes[row] != changes[begun]:
            run, begun = gcd(run, row - begun), row
    return run

"""Convolutions with a different kernel for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["convolve_by_products", "multiplies", "turned"]


def multiplies(layer: nn.Conv2d) -> bool:
    """Whether :func:`convolve_by_products` supports the layer's settings."""
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    return all(int(p) < k for p, k in zip(layer.padding, layer.kernel_size, strict=True))


def turned(kernels: Tensor) -> Tensor:
    """Arrange kernels for :func:`convolve_by_products`.

    Args:
        kernels: ``[rows, rank, in, kernel height, kernel width]``.

    Returns:
        ``[rows, rank * kernel height * kernel width, in]``.
    """
    # Flipped, as a cell is the left neighbor of its right neighbor.
    return kernels.flip(-2, -1).permute(0, 1, 3, 4, 2).flatten(1, 3)


def convolve_by_products(layer: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve all rows in one batch of matrix products, however many kernels they have.

    The products compute what every cell contributes to each of its neighbors, and the contributions
    are then summed. This takes as much arithmetic as the convolutions, in a few kernel launches.
    For a layer with a stride, all cells are computed and the surplus is discarded.

    Args:
        layer: layer whose padding and stride are used; see :func:`multiplies`.
        x: ``[rows, in, height, width]``.
        kernels: see :func:`turned`.

    Returns:
        ``[rows, rank, new height, new width]``.
    """
    size = layer.kernel_size
    contributions = torch.bmm(kernels, x.flatten(2))
    padding = [int(one) for one in layer.padding]
    new = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[-2:], padding, size, strict=True)]
    beyond = [k - 1 - p for k, p in zip(size, padding, strict=True)]
    fold: Any = F.fold
    all_cells = fold(contributions, new, size, padding=beyond)
    down, right = layer.stride
    return all_cells[:, :, ::down, ::right]

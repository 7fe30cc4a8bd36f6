"""Convolutions of rows that have a kernel each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["convolve_by_products", "multiplies", "turned"]


def multiplies(layer: nn.Conv2d) -> bool:
    """Whether :func:`convolve_by_products` can do what the layer does."""
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    return all(int(p) < k for p, k in zip(layer.padding, layer.kernel_size, strict=True))


def turned(kernels: Tensor) -> Tensor:
    """Kernels as :func:`convolve_by_products` reads them.

    Args:
        kernels: ``[rows, rank, in, kernel height, kernel width]``.

    Returns:
        ``[rows, rank * kernel height * kernel width, in]``.
    """
    # A cell is to the left of that which it is the right neighbour of.
    return kernels.flip(-2, -1).permute(0, 1, 3, 4, 2).flatten(1, 3)


def convolve_by_products(layer: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """One batch of products for all rows, however many kernels they have.

    It tells what every cell contributes to each of its neighbours; then these are added up. That
    is as much arithmetic as the convolutions are, in a few kernels of the device. Of a layer with
    a stride, all cells are computed and the others left out.

    Args:
        layer: whose padding and stride are used; see :func:`multiplies`.
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

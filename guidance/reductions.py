"""Per-row reductions in float64, independent of the other rows of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, float64.

    Args:
        a: first factors, ``[rows, C, h, w]``.
        b: second factors, of the same shape.

    Returns:
        The products, ``[rows, 1, 1, 1]``.
    """
    products = a.double() * b.double()
    return products.flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Covariances over the elements of rows, float64; of a row with itself, its variance.

    Args:
        a: first factors, ``[rows, C, h, w]``.
        b: second factors, of the same shape.

    Returns:
        The covariances, ``[rows, 1, 1, 1]``: sums divided by the number of elements.
    """
    axes = tuple(range(1, a.ndim))
    a, b = a.double(), b.double()
    return inner(a - a.mean(axes, keepdim=True), b - b.mean(axes, keepdim=True)) / a[0].numel()

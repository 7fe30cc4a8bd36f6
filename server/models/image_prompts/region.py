"""Regions in which image prompts act: a mask at the resolutions of a U-Net's layers."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

__all__ = ["region_bytes", "region_of"]


def region_of(mask: Tensor, height: int, width: int) -> dict[int, Tensor]:
    """Factors on each query's attention output, ``[queries, 1]``, by a layer's number of queries.

    The method is that of diffusers' ``IPAdapterMaskProcessor.downsample``, which guesses a layer's
    resolution from its number of queries and the aspect ratio of the mask. Here each resolution is
    half the previous one, rounded up, as in the network.

    Args:
        mask: ``[H, W]`` float32, 1 where the image prompt acts and 0 elsewhere.
        height: height of the latents.
        width: width of the latents.
    """
    # Reading requests needs only ``region_bytes``, and must not import torch.
    import torch.nn.functional as F

    return {
        prod(size): F.interpolate(mask[None, None], size=size, mode="bicubic").flatten()[:, None]
        for size in _resolutions(height, width)
    }


def region_bytes(height: int, width: int, dtype: torch.dtype) -> int:
    """Memory of the result of :func:`region_of` for latents of a size, in bytes."""
    return dtype.itemsize * sum(map(prod, _resolutions(height, width)))


def _resolutions(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Resolutions that a U-Net may have, down to a single cell."""
    yield height, width
    while height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
        yield height, width

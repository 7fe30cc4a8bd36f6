"""Where in an image an image prompt acts: a mask at the resolutions of a U-Net's layers."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

__all__ = ["region_bytes", "region_of"]


def region_of(mask: Tensor, height: int, width: int) -> dict[int, Tensor]:
    """Factors on what each query of a layer attends to, ``[queries, 1]``, by their number.

    As ``IPAdapterMaskProcessor.downsample`` of diffusers, which guesses a layer's resolution from
    its number of queries and the proportions of the mask. Here each is half of the one before it,
    rounded up, as in the network.

    Args:
        mask: ``[H, W]`` float32, 1 where the image prompt acts and 0 elsewhere.
        height: of the latents.
        width: of the latents.
    """
    # Requests need the bytes alone, and are read without torch.
    import torch.nn.functional as F

    return {
        prod(size): F.interpolate(mask[None, None], size=size, mode="bicubic").flatten()[:, None]
        for size in _resolutions(height, width)
    }


def region_bytes(height: int, width: int, dtype: torch.dtype) -> int:
    """Memory of what :func:`region_of` makes for latents of a size."""
    return dtype.itemsize * sum(map(prod, _resolutions(height, width)))


def _resolutions(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Those that a U-Net may have, down to a single point."""
    yield height, width
    while height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
        yield height, width

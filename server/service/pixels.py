"""Conversion of pictures to tensors."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["mask_tensor", "pixels_tensor", "region_tensor"]

HALF: Final = 128
"""Threshold from which a value is white, as diffusers rounds masks of image prompts."""


def pixels_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 `[H, W, 3]` to `[3, H, W]` float32 in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def region_tensor(gray: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 `[H, W]` to `[H, W]` float32, 0 or 1."""
    return torch.tensor(gray >= HALF).float()


def mask_tensor(gray: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 `[H, W]` to `[H, W]` float32 in [0, 1]."""
    return torch.tensor(gray).float().div(255)

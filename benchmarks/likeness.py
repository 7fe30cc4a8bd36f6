"""Similarity of a picture to a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["psnr"]


def psnr(pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in decibels.

    For equal pictures it is that of a difference of one level in a single value.

    Args:
        pixels: pixels of a picture, of any shape.
        wanted: pixels of the reference, of the same shape.
    """
    squares = np.square(pixels.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(255**2 * pixels.size / max(1.0, squares)))

"""How much a picture that was computed otherwise is like the picture itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["psnr"]


def psnr(pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """Peak signal to noise, in decibels; of equal pictures that of one level of a single value.

    Args:
        pixels: of one picture, of any shape.
        wanted: of the picture itself, of the same shape.
    """
    squares = np.square(pixels.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(255**2 * pixels.size / max(1.0, squares)))

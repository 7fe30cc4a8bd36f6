"""Initial content of the masked part of a picture, before a run starts from it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

__all__ = ["filled"]

BLURS: Final = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radius of each blur in pixels, and number of times that its result is composited."""


def filled(picture: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fill the masked part of a picture with the colors around it, as in AUTOMATIC1111.

    The kept part is blurred into the masked part, from the widest blur to none (its
    modules/masking.py, ``fill``).

    Args:
        picture: uint8 `[h, w, 3]`.
        mask: uint8 `[h, w]`, 255 where to fill.
    """
    whole = Image.fromarray(picture, mode="RGB")
    # With premultiplied colors, masked pixels do not contribute to a blur.
    kept = Image.new("RGBa", whole.size)
    opaque = whole.convert("RGBA").convert("RGBa")
    kept.paste(opaque, mask=ImageOps.invert(Image.fromarray(mask, mode="L")))
    result = Image.new("RGBA", whole.size)
    for radius, times in BLURS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    return np.asarray(result.convert("RGB"))

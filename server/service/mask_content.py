"""What is painted where a picture is to be repainted, before a run starts from it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

__all__ = ["filled"]

BLURS: Final = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radius in pixels, and how often what it makes is laid over what there is."""


def filled(picture: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture whose masked part has the colours around it, as AUTOMATIC1111 fills it.

    What is kept is blurred into the masked part, from the widest blur to none (its
    modules/masking.py, ``fill``).

    Args:
        picture: uint8 `[h, w, 3]`.
        mask: uint8 `[h, w]`, 255 where it is filled.
    """
    whole = Image.fromarray(picture, mode="RGB")
    # With colours multiplied by their opacity, what is masked has no part in a blur.
    kept = Image.new("RGBa", whole.size)
    opaque = whole.convert("RGBA").convert("RGBa")
    kept.paste(opaque, mask=ImageOps.invert(Image.fromarray(mask, mode="L")))
    result = Image.new("RGBA", whole.size)
    for radius, times in BLURS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    return np.asarray(result.convert("RGB"))

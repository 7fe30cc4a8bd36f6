"""Reference images, which a model takes besides a prompt to edit them or to refer to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ReferencesRead", "SeenPicture"]


@dataclass(frozen=True, slots=True)
class ReferencesRead:
    """How many reference images a model accepts, and at which sizes.

    Attributes:
        max_images: maximum number of images per request.
        sizes: pairs of width and height in pixels; each image is resized to the pair with the most
            similar aspect ratio. Empty where images keep their own aspect ratio.
        area: number of pixels to which each image is resized; None where it is only downscaled.
        seen_area: number of pixels of each image as given to the text encoder; None where the text
            encoder takes no images.
    """

    max_images: int
    sizes: tuple[tuple[int, int], ...] = ()
    area: int | None = None
    seen_area: int | None = None


@dataclass(frozen=True, slots=True)
class SeenPicture:
    """An image that the text encoder sees with every text of a generated image.

    Attributes:
        digest: identifies the image.
        pixels: uint8 ``[H, W, 3]``.
    """

    digest: bytes
    pixels: NDArray[np.uint8] = field(compare=False, repr=False)

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> SeenPicture:
        """Create one from pixels."""
        return cls(sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), pixels)

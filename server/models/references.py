"""What models read of pictures that stand beside a prompt, to edit or to refer to."""

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
    """How many such pictures a model reads, and at which sizes.

    Attributes:
        most: pictures of a request.
        sizes: width and height in pixels, of which each picture gets those whose proportions are
            nearest to its own; empty where it keeps its own.
        area: pixels that each picture is brought to; None where it is only reduced.
        seen_area: pixels of what the text encoder sees of each picture; None where it sees none.
    """

    most: int
    sizes: tuple[tuple[int, int], ...] = ()
    area: int | None = None
    seen_area: int | None = None


@dataclass(frozen=True, slots=True)
class SeenPicture:
    """A picture that a text encoder sees with every text of an image.

    Attributes:
        digest: by which it is known again.
        pixels: uint8 ``[H, W, 3]``.
    """

    digest: bytes
    pixels: NDArray[np.uint8] = field(compare=False, repr=False)

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> SeenPicture:
        """The picture of some pixels."""
        return cls(sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), pixels)

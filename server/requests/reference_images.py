"""The field `reference_images` of a request: pictures that its prompt refers to."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Final

from server.decoding.sizing import PictureTarget
from server.errors import InvalidRequest

if TYPE_CHECKING:
    from server.models.hosted import ModelFacts

__all__ = [
    "MAX_REFERENCES",
    "check_references",
    "largest_of",
    "max_reference_images",
    "seen_target_of",
    "target_of",
]

MAX_REFERENCES: Final = 4

AREA_MULTIPLE: Final = 32
"""Multiple for the sides of pictures that are resized to a given area, as in diffusers."""

MAX_PIXELS: Final = 1024 * 1024
"""Maximum pixels of a reference image; larger ones are reduced, as in diffusers, since each pixel
costs as much as one of the result."""


def check_references(count: int, facts: ModelFacts) -> None:
    """Refuse more reference images than the model reads.

    Args:
        count: number of reference images in the request.
        facts: facts of the model that will serve it.

    Raises:
        InvalidRequest: the model reads fewer, or none.
    """
    max_images = max_reference_images(facts)
    if count <= max_images:
        return
    if max_images:
        raise InvalidRequest(
            "reference_images",
            f"reference_images has {count} images; model {facts.name!r} reads at most "
            f"{max_images}.",
        )
    raise InvalidRequest(
        "reference_images",
        f"reference_images: model {facts.name!r} does not read reference images; send one as "
        "`image` to start from it, or leave reference_images out.",
    )


def max_reference_images(facts: ModelFacts) -> int:
    """Return the maximum number of reference images in a request to a model."""
    return 0 if facts.references is None else facts.references.max_images


def largest_of(facts: ModelFacts) -> tuple[int, int]:
    """Return the largest height and width of a reference image, used until its own are known."""
    side = isqrt(MAX_PIXELS) // facts.size_multiple * facts.size_multiple
    return side, side


def seen_target_of(facts: ModelFacts) -> PictureTarget | None:
    """Return the target size of a reference image for the text encoder; None if that reads none."""
    reads = facts.references
    if reads is None or reads.seen_area is None:
        return None
    return PictureTarget(area=reads.seen_area, multiple=AREA_MULTIPLE)


def target_of(facts: ModelFacts) -> PictureTarget:
    """Return the target size of a reference image: a size of the model's, or its own, rounded."""
    reads = facts.references
    if reads is not None and reads.area is not None:
        return PictureTarget(area=reads.area, multiple=AREA_MULTIPLE)
    sizes = () if reads is None else reads.sizes
    return PictureTarget(
        mode="stretch" if sizes else "crop",
        sizes=sizes,
        multiple=facts.size_multiple,
        longest=facts.longest_side,
        max_pixels=MAX_PIXELS,
    )

"""Reference images of a request, decoded at the sizes at which its model reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.decoding.pool import DecodePool
from server.models.hosted import HostedModel
from server.requests.reference_images import seen_target_of, target_of
from server.requests.schema import GenerateRequest

__all__ = ["ReferencePictures", "decoded_references"]


class ReferencePictures(NamedTuple):
    """Pictures that the prompt refers to, uint8 `[H, W, 3]`.

    Attributes:
        read: pictures as the denoiser reads them.
        seen: pictures as the text encoder sees them, if it does.
    """

    read: tuple[NDArray[np.uint8], ...] = ()
    seen: tuple[NDArray[np.uint8], ...] = ()


async def decoded_references(
    request: GenerateRequest,
    model: HostedModel,
    decoding: DecodePool,
    known: ReferencePictures,
    max_images: int | None = None,
) -> ReferencePictures:
    """Decode the reference images of a request.

    Args:
        request: request as sent.
        model: model that will serve it.
        decoding: pool that decodes the images.
        known: the first ones, if they are decoded already.
        max_images: maximum number of images; None for all.

    Raises:
        InvalidRequest: an image cannot be decoded.
        Overloaded: too many images wait to be decoded.
    """
    read, seen = list(known.read), list(known.seen)
    target, of_text = target_of(model.facts), seen_target_of(model.facts)
    for place, one in list(enumerate(request.reference_images))[len(read) : max_images]:
        field = f"reference_images.{place}"
        with one.opened() as data:
            read.append(await decoding.picture(data, field, target))
            if of_text is not None:
                seen.append(await decoding.picture(data, field, of_text))
    return ReferencePictures(tuple(read), tuple(seen))

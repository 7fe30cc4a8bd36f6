"""Masks given by an image's own transparency, as in OpenAI's edits."""

from __future__ import annotations

from typing import Final

from server.decoding.picture import MaskForm
from server.decoding.pool import DecodePool
from server.requests.schema import GenerateRequest

__all__ = ["with_own_mask"]

OWN: Final = MaskForm("own_clear")


async def with_own_mask(request: GenerateRequest, decoding: DecodePool) -> GenerateRequest:
    """Return the request, with the image's transparent pixels as its mask if it has any.

    Args:
        request: request with an image; one with a mask is returned unchanged.
        decoding: pool that decodes the image.

    Raises:
        InvalidRequest: the image cannot be decoded.
        Overloaded: too many images wait to be decoded.
    """
    if request.image is None or request.mask is not None:
        return request
    with request.image.copied(OWN).opened() as data:
        clear = await decoding.mask(data, "image", form=OWN)
    if not clear.any():
        return request
    return request.model_copy(update={"mask": request.image.copied(OWN)})

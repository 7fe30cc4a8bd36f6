"""The images that were sent with a request, decoded at the sizes that its runs need."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.decoding.picture import MaskForm
from server.decoding.pool import DecodePool
from server.decoding.sizing import Target
from server.models.hosted import HostedModel
from server.requests.controls import ControlChoice
from server.requests.image_prompts import sides_of_image_prompts
from server.requests.resolve import Prepared
from server.requests.schema import DEFAULT_RESIZE_MODE, GenerateRequest, ResolvedRequest
from server.requests.upload import Upload
from server.service.mask_content import filled

__all__ = ["Uploads", "decoded", "image_for_its_size"]


class Uploads(NamedTuple):
    """The images that were sent with a request, at the size of its run, or of the second one.

    Those beside the prompt have the size that their encoders read. `kept` is the image as it was
    sent, where the part to repaint is filled in `image`.
    """

    image: NDArray[np.uint8] | None
    kept: NDArray[np.uint8] | None
    mask: NDArray[np.uint8] | None
    reference: NDArray[np.uint8] | None
    controls: Sequence[NDArray[np.uint8]]
    controls_again: Sequence[NDArray[np.uint8]]
    image_prompts: Sequence[NDArray[np.uint8]]


async def image_for_its_size(
    request: GenerateRequest, model: HostedModel, decoding: DecodePool
) -> tuple[NDArray[np.uint8] | None, tuple[int, int] | None]:
    """The size of the image that the request starts from, and the image if that took it.

    A request that gives its size is checked before its image is decoded.

    Args:
        request: as sent.
        model: that will serve it.
        decoding: reads the image.

    Returns:
        The image, uint8 `[H, W, 3]`, or None if it was not decoded; width and height, or None if
        the request has no image.

    Raises:
        InvalidRequest: the image cannot be decoded.
        Overloaded: too many images wait to be decoded.
    """
    if request.image is None:
        return None, None
    if request.width is not None and request.height is not None:
        return None, (request.width, request.height)
    target = Target(
        request.width,
        request.height,
        request.resize_mode or DEFAULT_RESIZE_MODE,
        model.facts.size_multiple,
        model.facts.longest_side,
    )
    image = await _picture(decoding, request.image, "image", target)
    return image, (image.shape[1], image.shape[0])


async def decoded(
    request: GenerateRequest,
    prepared: Prepared,
    model: HostedModel,
    image: NDArray[np.uint8] | None,
    decoding: DecodePool,
) -> Uploads:
    """Decode the images of a request that was checked.

    Args:
        request: as sent.
        prepared: the same with every default filled in, and its second run if it has one.
        model: that will serve it.
        image: that the request starts from, if its size was needed and it is decoded already.
        decoding: reads the images.

    Raises:
        InvalidRequest: an image cannot be decoded.
        Overloaded: too many images wait to be decoded.
    """
    target = _target(prepared.request)
    mask = reference = None
    if image is None and request.image is not None:
        image = await _picture(decoding, request.image, "image", target)
    if request.mask is not None:
        with request.mask.opened() as text:
            form = request.mask.form or MaskForm()
            mask = await decoding.mask(text, "mask", target, form)
    kept = None
    if prepared.request.mask_content == "fill" and image is not None and mask is not None:
        kept, image = image, await asyncio.to_thread(filled, image, mask)
    if request.reference is not None:
        reference = await _picture(decoding, request.reference, "reference", target)
    controls = list[NDArray[np.uint8]]()
    controls_again = list[NDArray[np.uint8]]()
    for place, control in enumerate(request.controls):
        field, target = f"controls.{place}.image", _target(prepared.request, control)
        with control.image.opened() as text:
            controls.append(_prepared(control, await decoding.picture(text, field, target)))
            if prepared.second is not None:
                larger = _target(prepared.second.request, control)
                again = await decoding.picture(text, field, larger)
                controls_again.append(_prepared(control, again))
    shown = prepared.request.image_prompts
    sides = await asyncio.to_thread(sides_of_image_prompts, shown, model)
    image_prompts = [
        await _picture(
            decoding, one.image, f"image_prompts.{place}.image", Target(side, side, "middle")
        )
        for place, (one, side) in enumerate(zip(request.image_prompts, sides, strict=True))
    ]
    return Uploads(image, kept, mask, reference, controls, controls_again, image_prompts)


async def _picture(
    decoding: DecodePool, upload: Upload, field: str, target: Target
) -> NDArray[np.uint8]:
    with upload.opened() as text:
        return await decoding.picture(text, field, target)


def _target(resolved: ResolvedRequest, control: ControlChoice | None = None) -> Target:
    """What an uploaded image is brought to, or the picture of a ControlNet."""
    own = None if control is None else control.resize_mode
    mode = own or resolved.resize_mode or DEFAULT_RESIZE_MODE
    return Target(resolved.width, resolved.height, mode)


def _prepared(control: ControlChoice, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return 255 - picture if control.preprocessor == "invert" else picture

"""Images that were sent with a request, decoded at the sizes that its runs need."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.decoding.picture import MaskForm
from server.decoding.pool import DecodePool
from server.decoding.sizing import PictureTarget
from server.models.hosted import HostedModel
from server.requests.controls import ControlChoice
from server.requests.image_prompts import ImagePromptChoice, sides_of_image_prompts
from server.requests.reference_images import check_references
from server.requests.resolve import Prepared
from server.requests.schema import DEFAULT_RESIZE_MODE, GenerateRequest, ResolvedRequest
from server.requests.upload import Upload
from server.service.mask_content import filled
from server.service.reference_pictures import ReferencePictures, decoded_references

__all__ = ["ACTS", "EarlyImages", "Uploads", "decode_for_size", "decoded"]


UNBOUNDED: Final = 2**60
"""A number of pixels that no request reaches."""

ACTS: Final = MaskForm("acts")
"""Form of the mask of an image prompt, which marks where it acts."""


class Uploads(NamedTuple):
    """Images that were sent with a request, at the size of its run, or of the second one.

    Image prompts and reference images have the sizes at which the model reads them, and regions the
    size of the run. `kept` is the image as it was sent, if the part to repaint is filled in
    `image`.
    """

    image: NDArray[np.uint8] | None
    kept: NDArray[np.uint8] | None
    mask: NDArray[np.uint8] | None
    reference: NDArray[np.uint8] | None
    controls: Sequence[NDArray[np.uint8]]
    controls_again: Sequence[NDArray[np.uint8]]
    image_prompts: Sequence[Sequence[NDArray[np.uint8]]]
    regions: Sequence[NDArray[np.uint8] | None]
    regions_again: Sequence[NDArray[np.uint8] | None]
    references: ReferencePictures


class EarlyImages(NamedTuple):
    """What must be known about a request's images before it can be checked.

    Attributes:
        image: image that it starts from, uint8 `[H, W, 3]`, if it was decoded.
        references: the first of its reference images, if that was decoded.
        size: width and height of the image that it starts from; None without one.
        reference_size: width and height of the result by the reference image; None if that does not
            determine them.
    """

    image: NDArray[np.uint8] | None = None
    references: ReferencePictures = ReferencePictures()
    size: tuple[int, int] | None = None
    reference_size: tuple[int, int] | None = None


async def decode_for_size(
    request: GenerateRequest, model: HostedModel, decoding: DecodePool
) -> EarlyImages:
    """Decode the image that determines the result's size, if the request does not give it.

    A request that gives its size is checked before its images are decoded.

    Args:
        request: request as sent.
        model: model that will serve it.
        decoding: pool that decodes the image.

    Raises:
        InvalidRequest: the image cannot be decoded, or the model reads no reference images.
        Overloaded: too many images wait to be decoded.
    """
    if request.width is not None and request.height is not None:
        size = request.width, request.height
        return EarlyImages(size=None if request.image is None else size)
    if request.image is None:
        return await _by_reference(request, model, decoding)
    target = PictureTarget(
        request.width,
        request.height,
        request.resize_mode or DEFAULT_RESIZE_MODE,
        model.facts.size_multiple,
        model.facts.longest_side,
    )
    image = await _picture(decoding, request.image, "image", target)
    return EarlyImages(image=image, size=(image.shape[1], image.shape[0]))


async def _by_reference(
    request: GenerateRequest, model: HostedModel, decoding: DecodePool
) -> EarlyImages:
    """Decode the first reference image, and derive the size of a result in its proportions."""
    if not request.reference_images:
        return EarlyImages()
    facts = model.facts
    check_references(len(request.reference_images), facts)
    first = await decoded_references(request, model, decoding, ReferencePictures(), max_images=1)
    height, width, _ = first.read[0].shape
    # Sides too long for the model or the operator are refused later, with the field's name.
    wanted = PictureTarget(request.width, request.height, multiple=facts.size_multiple)
    return EarlyImages(references=first, reference_size=wanted.size_of(width, height, UNBOUNDED))


async def decoded(
    request: GenerateRequest,
    prepared: Prepared,
    model: HostedModel,
    early: EarlyImages,
    decoding: DecodePool,
) -> Uploads:
    """Decode the images of a checked request.

    Args:
        request: request as sent.
        prepared: request with every default filled in, and its second run if it has one.
        model: model that will serve it.
        early: images that were decoded already, since their size was needed.
        decoding: pool that decodes the images.

    Raises:
        InvalidRequest: an image cannot be decoded.
        Overloaded: too many images wait to be decoded.
    """
    target = _target(prepared.request)
    image, mask, reference = early.image, None, None
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
    controls, controls_again = await _controls(decoding, request.controls, prepared)
    shown = prepared.request.image_prompts
    sides = await asyncio.to_thread(sides_of_image_prompts, shown, model)
    image_prompts = [
        await _beside(
            decoding, f"image_prompts.{place}.image", one, PictureTarget(side, side, "middle")
        )
        for place, (one, side) in enumerate(zip(request.image_prompts, sides, strict=True))
    ]
    masks = [one.mask for one in request.image_prompts]
    regions, regions_again = await _regions(decoding, masks, prepared)
    references = await decoded_references(request, model, decoding, early.references)
    return Uploads(
        image=image,
        kept=kept,
        mask=mask,
        reference=reference,
        controls=controls,
        controls_again=controls_again,
        image_prompts=image_prompts,
        regions=regions,
        regions_again=regions_again,
        references=references,
    )


async def _controls(
    decoding: DecodePool, chosen: Sequence[ControlChoice], prepared: Prepared
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Decode what each ControlNet reads, at the size of the run and of the second one."""
    pictures, again = list[NDArray[np.uint8]](), list[NDArray[np.uint8]]()
    for place, control in enumerate(chosen):
        field, target = f"controls.{place}.image", _target(prepared.request, control)
        with control.image.opened() as data:
            pictures.append(_prepared(control, await decoding.picture(data, field, target)))
            if prepared.second is not None:
                larger = _target(prepared.second.request, control)
                found = await decoding.picture(data, field, larger)
                again.append(_prepared(control, found))
    return pictures, again


async def _beside(
    decoding: DecodePool, field: str, prompt: ImagePromptChoice, target: PictureTarget
) -> list[NDArray[np.uint8]]:
    """Decode the pictures of an image prompt."""
    if len(prompt.image) == 1:
        return [await _picture(decoding, prompt.image[0], field, target)]
    return [
        await _picture(decoding, one, f"{field}.{place}", target)
        for place, one in enumerate(prompt.image)
    ]


async def _regions(
    decoding: DecodePool, masks: Sequence[Upload | None], prepared: Prepared
) -> tuple[list[NDArray[np.uint8] | None], list[NDArray[np.uint8] | None]]:
    """Decode where each image prompt acts, at the size of the run and of the second one."""
    regions: list[NDArray[np.uint8] | None] = [None] * len(masks)
    again = list(regions)
    for place, mask in enumerate(masks):
        if mask is None:
            continue
        field = f"image_prompts.{place}.mask"
        with mask.opened() as data:
            target = _target(prepared.request)
            regions[place] = await decoding.mask(data, field, target, ACTS)
            if prepared.second is not None:
                larger = _target(prepared.second.request)
                again[place] = await decoding.mask(data, field, larger, ACTS)
    return regions, again


async def _picture(
    decoding: DecodePool, upload: Upload, field: str, target: PictureTarget
) -> NDArray[np.uint8]:
    with upload.opened() as text:
        return await decoding.picture(text, field, target)


def _target(resolved: ResolvedRequest, control: ControlChoice | None = None) -> PictureTarget:
    """The size for an uploaded image, or for the picture of a ControlNet."""
    own = None if control is None else control.resize_mode
    mode = own or resolved.resize_mode or DEFAULT_RESIZE_MODE
    return PictureTarget(resolved.width, resolved.height, mode)


def _prepared(control: ControlChoice, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return 255 - picture if control.preprocessor == "invert" else picture

"""Repaints the region around a mask at the request's full size, like AUTOMATIC1111's "only masked".

The region is cropped, drawn at the width and height of the request, and pasted back, so that a
small part of a large picture gets all of the model's detail (its modules/masking.py).
"""

from __future__ import annotations

import io
from asyncio import to_thread
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from server.decoding.picture import MaskForm
from server.decoding.pool import DecodePool
from server.decoding.sizing import PictureTarget, ResizeMode
from server.errors import InvalidRequest
from server.image_codec import resized
from server.requests.controls import ControlChoice
from server.requests.image_prompts import ImagePromptChoice
from server.requests.schema import DEFAULT_RESIZE_MODE, GenerateRequest
from server.requests.upload import Upload
from server.service.uploads import ACTS

__all__ = ["Box", "Region", "around", "crop_to_mask"]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture: its edges in pixels, with right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def where(self) -> tuple[slice, slice]:
        """Index of the part in an array `[height, width, ...]`."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A picture of which a part is repainted.

    Attributes:
        picture: uint8 `[H, W, 3]`.
        mask: uint8 `[H, W]`, 255 where to repaint.
        box: part that is repainted.
    """

    picture: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    box: Box

    def put_back(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the whole picture with its part repainted.

        Args:
            pixels: uint8 `[h, w, 3]`, the part at the size at which it was drawn.
        """
        rows, columns = self.box.where
        part = self.picture[rows, columns]
        drawn = resized(pixels, part.shape[1], part.shape[0]).astype(np.float32)
        share = self.mask[rows, columns, None].astype(np.float32) / 255
        whole = self.picture.copy()
        whole[rows, columns] = np.rint(part + share * (drawn - part)).astype(np.uint8)
        return whole


def around(mask: NDArray[np.uint8], padding: int, width: int, height: int) -> Box:
    """The box around what a mask repaints, in the drawing's proportions if there is room.

    Args:
        mask: uint8 `[H, W]`; at least one pixel is not 0.
        padding: number of pixels to add around it.
        width: width of the drawing.
        height: height of the drawing.
    """
    image_height, image_width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right = _padded(int(columns[0]), int(columns[-1]) + 1, padding, image_width)
    top, bottom = _padded(int(rows[0]), int(rows[-1]) + 1, padding, image_height)
    wanted = max((right - left) / width, (bottom - top) / height)
    left, right = _widened(left, right, round(wanted * width), image_width)
    top, bottom = _widened(top, bottom, round(wanted * height), image_height)
    return Box(left, top, right, bottom)


def _padded(first: int, last: int, padding: int, max_end: int) -> tuple[int, int]:
    return max(0, first - padding), min(max_end, last + padding)


def _widened(first: int, last: int, size: int, max_end: int) -> tuple[int, int]:
    """Widen an interval to a size around its middle, shifted and limited to the picture."""
    size = min(max(size, last - first), max_end)
    first = min(max(0, first - (size - (last - first)) // 2), max_end - size)
    return first, first + size


async def crop_to_mask(
    request: GenerateRequest,
    padding: int,
    size: tuple[int, int],
    decoding: DecodePool,
    hold: Callable[[int], None],
) -> tuple[GenerateRequest, Region]:
    """Make a request for only the part around the mask, and return the region with it.

    Args:
        request: request with an image and a mask.
        padding: number of pixels around what is repainted.
        size: width and height of the drawing.
        decoding: pool that decodes image and mask.
        hold: function called with the bytes that the region keeps until the response; may refuse
            them.

    Raises:
        InvalidRequest: there is no image or mask, or one cannot be decoded.
        Overloaded: too many images wait to be decoded, or `hold` has no room.
    """
    if request.image is None or request.mask is None:
        raise InvalidRequest("mask", "mask is required, and an image that it is for.")
    with request.image.opened() as data:
        picture = await decoding.picture(data, "image")
    # The picture keeps its own size, which limits of a drawing do not bound; the mask adds a third.
    hold(picture.nbytes + picture.nbytes // 3)
    same_size = PictureTarget(picture.shape[1], picture.shape[0])
    with request.mask.opened() as data:
        form = request.mask.form or MaskForm()
        mask = await decoding.mask(data, "mask", same_size, form)
    if not mask.any():
        raise InvalidRequest("mask", "mask is so small that its blur leaves nothing of it.")
    region = Region(picture, mask, around(mask, padding, *size))
    parts = [await to_thread(_png, whole[region.box.where]) for whole in (picture, mask)]
    image_part, mask_part = map(Upload, parts)
    part: dict[str, Any] = {
        "image": image_part,
        "mask": mask_part,
        "width": size[0],
        "height": size[1],
    }
    part["controls"] = tuple(
        [
            await _cut(place, one, region, request.resize_mode, decoding)
            for place, one in enumerate(request.controls)
        ]
    )
    beside = [
        await _cut_mask(place, one, region, request.resize_mode, decoding)
        for place, one in enumerate(request.image_prompts)
    ]
    part["image_prompts"] = tuple(one for one in beside if one is not None)
    return request.model_copy(update=part | {"resize_mode": "stretch"}), region


async def _cut(
    place: int,
    control: ControlChoice,
    region: Region,
    mode: ResizeMode | None,
    decoding: DecodePool,
) -> ControlChoice:
    """A ControlNet with its picture cropped to the part over the region."""
    height, width = region.mask.shape
    target = PictureTarget(width, height, control.resize_mode or mode or DEFAULT_RESIZE_MODE)
    with control.image.opened() as data:
        picture = await decoding.picture(data, f"controls.{place}.image", target)
    part = Upload(await to_thread(_png, picture[region.box.where]))
    return control.model_copy(update={"image": part, "resize_mode": "stretch"})


async def _cut_mask(
    place: int,
    prompt: ImagePromptChoice,
    region: Region,
    mode: ResizeMode | None,
    decoding: DecodePool,
) -> ImagePromptChoice | None:
    """An image prompt with its mask cropped to the region; None if none of the mask lies there."""
    if prompt.mask is None:
        return prompt
    height, width = region.mask.shape
    target = PictureTarget(width, height, mode or DEFAULT_RESIZE_MODE)
    with prompt.mask.opened() as data:
        mask = await decoding.mask(data, f"image_prompts.{place}.mask", target, ACTS)
    part = mask[region.box.where]
    if not part.any():
        return None
    return prompt.model_copy(update={"mask": Upload(await to_thread(_png, part))})


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

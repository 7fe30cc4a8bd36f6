"""`/sdapi/v1/extra-single-image` and `extra-batch-images`: upscaling without a model."""

from __future__ import annotations

import base64
from asyncio import to_thread

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidRequest
from server.http.automatic1111.route import ERRORS, TolerantRoute
from server.http.dependencies import ServiceDep
from server.image_codec import encode
from server.requests.automatic1111_hires import UPSCALERS
from server.requests.upload import Upload
from server.service.service import Service

__all__ = ["router"]

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"], route_class=TolerantRoute)


class Enlargement(BaseModel):
    """Settings for upscaling in AUTOMATIC1111's format; unknown fields are ignored.

    Face restoration and a second upscaler are refused if their visibility is not 0.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    upscaler_1: str = Field(
        default="None", max_length=128, description="`Lanczos`; `None` leaves the image as it is."
    )
    resize_mode: int = Field(
        default=0, ge=0, le=1, description="0 takes `upscaling_resize`, 1 the width and height."
    )
    upscaling_resize: float = Field(
        default=2, gt=0, le=10**4, description="Factor for width and height."
    )
    upscaling_resize_w: int = Field(default=512, ge=1, le=10**5, description="Width of the result.")
    upscaling_resize_h: int = Field(
        default=512, ge=1, le=10**5, description="Height of the result."
    )
    upscaling_crop: bool = Field(
        default=True,
        description="Whether an image of other proportions is cropped; otherwise it is made to fit "
        "in.",
    )
    gfpgan_visibility: float = 0
    codeformer_visibility: float = 0
    extras_upscaler_2_visibility: float = 0

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of the result for an image of a given size."""
        if self.upscaler_1 == "None":
            return width, height
        if self.resize_mode == 0:
            factor = self.upscaling_resize
            return max(1, round(factor * width)), max(1, round(factor * height))
        wide, high = self.upscaling_resize_w, self.upscaling_resize_h
        if self.upscaling_crop:
            return wide, high
        factor = min(wide / width, high / height)
        return max(1, round(factor * width)), max(1, round(factor * height))


class Single(Enlargement):
    """A request of AUTOMATIC1111's `POST /sdapi/v1/extra-single-image`."""

    image: Upload = Field(repr=False, description="PNG, JPEG or WebP in base64.")


class NamedImage(BaseModel):
    """One of several images."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    data: Upload = Field(repr=False, description="PNG, JPEG or WebP in base64.")
    name: str = Field(default="", max_length=1024, description="Ignored.")


class BatchRequest(Enlargement):
    """A request of AUTOMATIC1111's `POST /sdapi/v1/extra-batch-images`."""

    imageList: tuple[NamedImage, ...] = Field(  # noqa: N815 - AUTOMATIC1111's name
        min_length=1, description="The images."
    )


class Enlarged(BaseModel):
    """The enlarged image."""

    html_info: str = ""
    image: str = Field(description="PNG in base64.")


class EnlargedImages(BaseModel):
    """The enlarged images."""

    html_info: str = ""
    images: list[str] = Field(description="PNG images in base64, in the order of the request.")


@router.post("/extra-single-image", responses=ERRORS)
async def extra_single_image(body: Single, request: Request, service: ServiceDep) -> Enlarged:
    """Enlarge an image with Lanczos resampling."""
    _check(body)
    return Enlarged(image=await _enlarged(body, "image", body.image, request, service))


@router.post("/extra-batch-images", responses=ERRORS)
async def extra_batch_images(
    body: BatchRequest, request: Request, service: ServiceDep
) -> EnlargedImages:
    """Enlarge images with Lanczos resampling, one after the other."""
    _check(body)
    limit = request.app.state.settings.limits.images
    if len(body.imageList) > limit:
        raise InvalidRequest(
            "imageList", f"imageList has {len(body.imageList)} images; at most {limit} are allowed."
        )
    images = [
        await _enlarged(body, f"imageList.{place}.data", one.data, request, service)
        for place, one in enumerate(body.imageList)
    ]
    return EnlargedImages(images=images)


async def _enlarged(
    how: Enlargement, field: str, image: Upload, request: Request, service: Service
) -> str:
    with image.opened() as data:
        picture = await service.decoding.picture(data, field)
    width, height = how.size_of(picture.shape[1], picture.shape[0])
    limit = request.app.state.settings.limits.upload_pixels
    if width * height > limit:
        asked = "upscaling_resize" if how.resize_mode == 0 else "upscaling_resize_w"
        raise InvalidRequest(
            asked,
            f"{asked} makes an image of {width} x {height}; at most {limit} pixels are allowed.",
        )
    request.state.share.hold(picture.nbytes + 3 * width * height)
    # A large image takes seconds in a thread of the pool that all other requests need.
    async with request.app.state.enlarging:
        return await to_thread(_made, picture, width, height)


def _check(body: Enlargement) -> None:
    """Refuse unsupported settings.

    Raises:
        InvalidRequest: the upscaler is unknown, or face restoration or a second upscaler is on.
    """
    if body.upscaler_1 not in UPSCALERS:
        raise InvalidRequest(
            "upscaler_1",
            f"upscaler_1 is {body.upscaler_1!r}; allowed are: {', '.join(UPSCALERS)}.",
        )
    for name in ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility"):
        if getattr(body, name):
            raise InvalidRequest(
                name, f"{name} is {getattr(body, name)}, which is not supported; leave it at 0."
            )


def _made(picture: NDArray[np.uint8], width: int, height: int) -> str:
    image = Image.fromarray(picture, mode="RGB")
    larger = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return base64.b64encode(encode(np.asarray(larger), "png")).decode()

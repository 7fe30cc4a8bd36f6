"""Response bodies and stream events for images in OpenAI's format."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from server.http.results import Link
from server.image_codec import encode, resized
from server.requests.schema import ResolvedRequest
from server.service.generation import Generation
from server.service.pictures import Picture, Pictures

__all__ = ["Event", "ImagesAnswer", "Kind", "answered", "finished", "previewed"]

Kind = Literal["image_generation", "image_edit"]


class InputTokens(BaseModel):
    """Tokens of the input, which are not counted."""

    text_tokens: int = 0
    image_tokens: int = 0


class Usage(BaseModel):
    """Usage that OpenAI charges for; here everything is 0."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = Field(default=None, description="The image file in base64.")
    url: str | None = Field(
        default=None, description="URL of the image for a limited time, if requested."
    )
    seed: int = Field(description="As in `POST /v1/generate`.")


class ImagesAnswer(BaseModel):
    """OpenAI's response, with the fields of `POST /v1/generate` added."""

    created: int = Field(description="Unix time at which the request arrived.")
    data: list[ImageData]
    size: str = Field(description="Width and height, such as `512x512`.")
    background: Literal["opaque"] = "opaque"
    output_format: str
    usage: Usage = Usage()
    id: str
    model: str
    settings: dict[str, Any] = Field(description="As in `POST /v1/generate`.")
    warnings: list[str] = Field(
        description="As in `POST /v1/generate`, and what was ignored of the request."
    )
    notes: list[str] = Field(description="As in `POST /v1/generate`.")


class Event(BaseModel):
    """One event of a stream: a preview or an image."""

    type: str
    b64_json: str
    partial_image_index: int | None = Field(
        default=None, description="Index of a preview, from 0; null for an image."
    )
    created_at: int = Field(description="Unix time at which the request arrived.")
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: str
    usage: Usage | None = Field(default=None, description="Only of an image.")
    seed: int | None = Field(default=None, description="Only of an image.")
    warnings: list[str] | None = Field(default=None, description="Only of an image.")


def answered(
    generation: Generation,
    pictures: Pictures,
    links: Sequence[Link] | None,
    ignored: Sequence[str],
) -> ImagesAnswer:
    """Return the response with the images of a generation.

    Args:
        generation: generation that made the images.
        pictures: images.
        links: URL of each image, if URLs were requested.
        ignored: sentences about fields without effect.
    """
    request = generation.request
    return ImagesAnswer(
        created=int(generation.created),
        data=_data(pictures.pictures, links),
        size=_size(request),
        output_format=request.output_format,
        id=generation.id,
        model=request.model,
        settings=dict(pictures.settings),
        warnings=[*ignored, *generation.warnings],
        notes=list(generation.notes),
    )


def previewed(kind: Kind, generation: Generation, index: int, preview: np.ndarray) -> Event:
    """Return the event for a preview, in the size and format of the image.

    Args:
        kind: kind of the stream.
        generation: generation that makes the image.
        index: index of the preview, from 0.
        preview: pixels, uint8 `[h, w, 3]`.
    """
    request = generation.request
    pixels = resized(preview, *request.drawn_size)
    return Event(
        type=f"{kind}.partial_image",
        b64_json=base64.b64encode(encode(pixels, request.output_format)).decode(),
        partial_image_index=index,
        created_at=int(generation.created),
        size=_size(request),
        output_format=request.output_format,
    )


def finished(kind: Kind, generation: Generation, picture: Picture, ignored: Sequence[str]) -> Event:
    """Return the event for an image."""
    request = generation.request
    return Event(
        type=f"{kind}.completed",
        b64_json=base64.b64encode(picture.data).decode(),
        created_at=int(generation.created),
        size=_size(request),
        output_format=request.output_format,
        usage=Usage(),
        seed=picture.seed,
        warnings=[*ignored, *generation.warnings],
    )


def _data(pictures: Sequence[Picture], links: Sequence[Link] | None) -> list[ImageData]:
    if links is not None:
        return [
            ImageData(url=link.url, seed=picture.seed)
            for picture, link in zip(pictures, links, strict=True)
        ]
    return [
        ImageData(b64_json=base64.b64encode(picture.data).decode(), seed=picture.seed)
        for picture in pictures
    ]


def _size(request: ResolvedRequest) -> str:
    return "{}x{}".format(*request.drawn_size)

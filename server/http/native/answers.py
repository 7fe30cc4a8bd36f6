"""Bodies of the responses and events of a generation."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from server.http.results import Link
from server.image_codec import encode
from server.service.generation import Generation, Progress
from server.service.pictures import Picture, Pictures

__all__ = [
    "CancelResponse",
    "GenerateResponse",
    "PositionEvent",
    "ProgressEvent",
    "QueuedEvent",
    "completed",
    "progressed",
    "queued",
]


class ImageOut(BaseModel):
    """One image."""

    b64_json: str | None = Field(
        default=None, description="The image file in base64, unless a URL was requested."
    )
    url: str | None = Field(default=None, description="URL of the image, if requested.")
    expires_at: int | None = Field(default=None, description="Unix time at which the URL expires.")
    seed: int = Field(
        description="This seed with n = 1 makes this image again, unless the images of the "
        "request depend on each other through `guidance.particles`, or through "
        "`guidance.negtome` without a `reference`."
    )


class Evaluations(BaseModel):
    """Evaluations of the denoiser: one for each prediction of each image at each stage."""

    spent: int = Field(description="Evaluations made.")
    saved: int = Field(
        description="Evaluations that guidance policies and step caches made unnecessary."
    )


class Particles(BaseModel):
    """How images that act as particles were resampled."""

    ancestors: list[int] = Field(
        description="For each image, the index of the image that it descends from."
    )
    effective: list[float] = Field(description="Effective number of particles at each resampling.")


class Timings(BaseModel):
    """Seconds; for several images, those of the slowest."""

    queue_s: float
    denoise_s: float
    decode_s: float
    total_s: float = Field(description="From arrival to the last encoded byte of the images.")


class GenerateResponse(BaseModel):
    """The images of a request and how they were made."""

    id: str = Field(description="Identifier of the generation, also in the header `x-request-id`.")
    created: int = Field(description="Unix time at which the request arrived.")
    model: str
    images: list[ImageOut]
    settings: dict[str, Any] = Field(
        description="The request with every default filled in; posted back, it makes the "
        "same images."
    )
    statistics: str | None = Field(
        default=None,
        description="Guidance whose model statistics the sampler was planned with, as the catalog "
        "names it; null for samplers that use none.",
    )
    warnings: list[str] = Field(
        description="One sentence for each setting of the request that has no effect, or that the "
        "model was not distilled for."
    )
    notes: list[str] = Field(
        description="One sentence about the settings that were chosen for a distilled model by its "
        "convention, and how that is known; empty for other models and if the request names all."
    )
    evaluations: Evaluations
    particles: Particles | None = Field(default=None, description="Only with `guidance.particles`.")
    timings: Timings


class QueuedEvent(BaseModel):
    """The first event of a stream."""

    id: str = Field(description="`DELETE /v1/generate/{id}` cancels the generation.")
    created: int
    model: str
    settings: dict[str, Any]
    queue_position: int | None = Field(
        default=None,
        description="Number of earlier requests that have not begun either; null if it has begun. "
        "Keys take turns, so that requests of other keys may begin before those.",
    )
    statistics: str | None = Field(default=None, description="As in the response.")
    warnings: list[str] = Field(description="As in the response.")
    notes: list[str] = Field(description="As in the response.")


class PositionEvent(BaseModel):
    """A changed position in the queue, sent at most once a second until the request begins."""

    queue_position: int = Field(description="As in the event `queued`.")


class ProgressEvent(BaseModel):
    """Progress of one image; a slow reader gets only the latest event of each image."""

    index: int = Field(description="Index of the image, from 0.")
    step: int = Field(description="Steps completed.")
    steps: int = Field(description="Steps in total.")
    preview: str | None = Field(description="A small JPEG as a data URI.")


class CancelResponse(BaseModel):
    """Confirms that a generation was cancelled."""

    id: str
    cancelled: bool


def completed(
    generation: Generation, pictures: Pictures, links: Sequence[Link] | None = None
) -> GenerateResponse:
    """Return the response with the images of a generation.

    Args:
        generation: generation that made the images.
        pictures: images.
        links: URL of each image, if URLs were requested.
    """
    return GenerateResponse(
        id=generation.id,
        created=int(generation.created),
        model=generation.request.model,
        images=_images(pictures.pictures, links),
        settings=dict(pictures.settings),
        statistics=generation.statistics,
        warnings=list(generation.warnings),
        notes=list(generation.notes),
        evaluations=Evaluations(spent=pictures.spent, saved=pictures.saved),
        particles=Particles(ancestors=list(pictures.ancestors), effective=list(pictures.effective))
        if pictures.ancestors
        else None,
        timings=Timings(
            queue_s=pictures.queue_s,
            denoise_s=pictures.denoise_s,
            decode_s=pictures.decode_s,
            total_s=pictures.total_s,
        ),
    )


def _images(pictures: Sequence[Picture], links: Sequence[Link] | None) -> list[ImageOut]:
    if links is None:
        return [
            ImageOut(b64_json=base64.b64encode(picture.data).decode(), seed=picture.seed)
            for picture in pictures
        ]
    return [
        ImageOut(url=link.url, expires_at=link.expires_at, seed=picture.seed)
        for picture, link in zip(pictures, links, strict=True)
    ]


def queued(generation: Generation) -> QueuedEvent:
    """Return the first event of a generation's stream."""
    return QueuedEvent(
        id=generation.id,
        created=int(generation.created),
        model=generation.request.model,
        settings=generation.request.settings(),
        queue_position=generation.queue_position,
        statistics=generation.statistics,
        warnings=list(generation.warnings),
        notes=list(generation.notes),
    )


def progressed(progress: Progress) -> ProgressEvent:
    """Return the event for the progress of one image, with its preview encoded."""
    preview = None
    if progress.preview is not None:
        data = base64.b64encode(encode(progress.preview, "jpeg")).decode()
        preview = f"data:image/jpeg;base64,{data}"
    return ProgressEvent(
        index=progress.index, step=progress.step, steps=progress.steps, preview=preview
    )

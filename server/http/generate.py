"""`/v1/generate`: images from a prompt, as JSON, as an image file or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from server.errors import WeftError
from server.http.dependencies import IdentifierDep, ServiceDep, json_only
from server.http.errors import ErrorBody, body_of
from server.http.negotiation import negotiate
from server.image_codec import MEDIA_TYPES, encode
from server.requests.schema import GenerateRequest
from server.service.generation import Generation, Progress
from server.service.service import Pictures, Service

__all__ = ["router"]

router = APIRouter(tags=["generate"])

PING_S: Final = 15.0
"""Seconds of silence after which a stream sends a keep-alive comment."""


class ImageOut(BaseModel):
    """One image."""

    b64_json: str = Field(description="The image file in base64.")
    seed: int = Field(
        description="This seed with n = 1 makes this image again, unless the images of the "
        "request depend on each other through `guidance.particles`, or through "
        "`guidance.negtome` without a `reference`."
    )


class Evaluations(BaseModel):
    """Evaluations of the denoiser: one for each prediction of each image at each stage."""

    spent: int = Field(description="Evaluations made.")
    saved: int = Field(description="Evaluations that the guidance policy made unnecessary.")


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
    """The images of a request, and how they were made."""

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
        description="One sentence for each setting of the request that has no effect."
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
    statistics: str | None = Field(default=None, description="As in the answer.")
    warnings: list[str] = Field(description="As in the answer.")


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


_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 503)
}
_OTHER_FORMS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "content": {
            "text/event-stream": {"schema": {"type": "string"}},
            **{
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in MEDIA_TYPES.values()
            },
        }
    }
}


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses=_ERRORS | _OTHER_FORMS,
    dependencies=[Depends(json_only)],
)
async def generate(
    body: GenerateRequest, request: Request, service: ServiceDep, identifier: IdentifierDep
) -> Any:
    """Generate images.

    The `Accept` header chooses the form of the response: JSON; `image/png`, `image/jpeg` or
    `image/webp` for one image file; `text/event-stream` (or `stream: true`) for the events
    `queued`, `progress`, and `completed` or `error`. Disconnecting cancels the generation.

    The header `x-request-id` of the request (1 to 64 letters, digits, dots, dashes, underscores)
    becomes the generation's id, so that `DELETE /v1/generate/{id}` can cancel it at once; without
    that header the response and the `queued` event contain the id.
    """
    wanted, body = negotiate(request.headers.get("accept", ""), body)
    if wanted == "events":
        generation = await service.admit(body, identifier)
        return GenerationStream(service, generation)
    made = await _unless_disconnected(request, _made(service, body, identifier))
    if made is None:
        return Response(status_code=499)
    generation, pictures = made
    if wanted == "image":
        picture = pictures.pictures[0]
        return Response(
            picture.data,
            media_type=MEDIA_TYPES[generation.request.output_format],
            headers={"x-seed": str(picture.seed)},
        )
    return Response(
        _response(generation, pictures).model_dump_json(), media_type="application/json"
    )


@router.delete("/v1/generate/{identifier}", responses={404: {"model": ErrorBody}})
async def cancel(
    identifier: Annotated[str, Path(max_length=64)], service: ServiceDep
) -> CancelResponse:
    """Cancel a running generation; its request gets an error with the code `cancelled`.

    A generation that has just completed is not cancelled: the response is then 404.
    """
    service.cancel(identifier)
    return CancelResponse(id=identifier, cancelled=True)


async def _made(
    service: Service, body: GenerateRequest, identifier: str
) -> tuple[Generation, Pictures]:
    generation = await service.admit(body, identifier)
    try:
        return generation, await service.pictures(generation)
    finally:
        service.release(generation)


async def _unless_disconnected(
    request: Request, work: Coroutine[Any, Any, tuple[Generation, Pictures]]
) -> tuple[Generation, Pictures] | None:
    """What `work` returns; None if the client disconnects first, which cancels the work."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        watching.cancel()
        working.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(generation: Generation, pictures: Pictures) -> GenerateResponse:
    return GenerateResponse(
        id=generation.id,
        created=int(generation.created),
        model=generation.request.model,
        images=[
            ImageOut(b64_json=base64.b64encode(picture.data).decode(), seed=picture.seed)
            for picture in pictures.pictures
        ],
        settings=dict(pictures.settings),
        statistics=generation.statistics,
        warnings=list(generation.warnings),
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


class GenerationStream(EventSourceResponse):
    """Streams the events of one generation, which ends when the connection does."""

    def __init__(self, service: Service, generation: Generation) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers)
        self._service = service
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.release(self._generation)

    async def _events(self) -> AsyncIterator[bytes]:
        generation = self._generation
        yield _event("queued", _queued(generation))
        try:
            while not generation.done:
                news = await generation.news(PING_S)
                for progress in news:
                    yield _event("progress", await asyncio.to_thread(_progress, progress))
                if not news and not generation.done:
                    yield KEEPALIVE_COMMENT
            pictures = await self._service.pictures(generation)
            yield _event("completed", _response(generation, pictures))
        except WeftError as error:
            yield format_sse_event(event="error", data_str=json.dumps(body_of(error)))


def _queued(generation: Generation) -> QueuedEvent:
    return QueuedEvent(
        id=generation.id,
        created=int(generation.created),
        model=generation.request.model,
        settings=generation.request.settings(),
        statistics=generation.statistics,
        warnings=list(generation.warnings),
    )


def _progress(progress: Progress) -> ProgressEvent:
    preview = None
    if progress.preview is not None:
        data = base64.b64encode(encode(progress.preview, "jpeg")).decode()
        preview = f"data:image/jpeg;base64,{data}"
    return ProgressEvent(
        index=progress.index, step=progress.step, steps=progress.steps, preview=preview
    )


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json())

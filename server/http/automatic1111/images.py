"""`/sdapi/v1`: generation, progress and interruption in AUTOMATIC1111's format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from server.engine.client import Client
from server.errors import Cancelled
from server.http.automatic1111.answers import (
    GenerationAnswer,
    ProgressAnswer,
    answered,
    idle,
    parameters_of,
    progress_of,
)
from server.http.automatic1111.checkpoints import CheckpointsDep, chosen, named
from server.http.automatic1111.jobs import ClientJob, JobsDep, owner_of
from server.http.automatic1111.route import ERRORS, TolerantRoute
from server.http.body import Share
from server.http.dependencies import IdentifierDep, ServiceDep, client_of
from server.http.making import cancel_on_disconnect
from server.image_codec import resized
from server.requests.automatic1111 import Img2Img, Translated, Txt2Img, translated
from server.service.generation import Generation
from server.service.masked_region import Region, crop_to_mask
from server.service.pictures import Picture
from server.service.service import Service

__all__ = ["router"]

LATENT_CELL: Final = 8
"""Pixels of a latent cell, assumed while the size multiple of the model is unknown."""

USUAL_SIZE: Final = 512, 512
"""Width and height of an image, assumed while the model's default size is unknown: AUTOMATIC1111's
default."""

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"], route_class=TolerantRoute)


@router.post("/txt2img", response_model=GenerationAnswer, responses=ERRORS)
async def txt2img(
    body: Txt2Img,
    request: Request,
    service: ServiceDep,
    jobs: JobsDep,
    checkpoints: CheckpointsDep,
    identifier: IdentifierDep,
) -> Any:
    """Generate images from a prompt."""
    # In a thread, as it looks for adapters in folders.
    chosen_one = checkpoints.of(owner_of(request))
    wanted = await asyncio.to_thread(_translated, body, service, chosen_one)
    job = ClientJob(owner_of(request), wanted.request.n, wanted.request.steps or 0)
    with jobs.added(identifier, job):
        work = _made(service, wanted, job, identifier, client_of(request), request.state.share)
        made = await cancel_on_disconnect(request, work)
    if made is None:
        return Response(status_code=499)
    generation, pictures = made
    if generation is None:
        info = json.dumps({"infotexts": [], "warnings": ["Interrupted before it began."]})
        return GenerationAnswer(images=[], parameters=parameters_of(body), info=info)
    return answered(body, wanted, generation, pictures)


@router.post("/img2img", response_model=GenerationAnswer, responses=ERRORS)
async def img2img(
    body: Img2Img,
    request: Request,
    service: ServiceDep,
    jobs: JobsDep,
    checkpoints: CheckpointsDep,
    identifier: IdentifierDep,
) -> Any:
    """Generate images from an image and a prompt; with a mask, repaint a part of it."""
    return await txt2img(body, request, service, jobs, checkpoints, identifier)


@router.get("/progress")
async def progress(
    request: Request, jobs: JobsDep, *, skip_current_image: bool = False
) -> ProgressAnswer:
    """The progress of the client's oldest running request, with a preview."""
    own = jobs.of(owner_of(request))
    if not own:
        return idle()
    return await asyncio.to_thread(progress_of, own, with_image=not skip_current_image)


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request, jobs: JobsDep) -> dict[str, Any]:
    """End the client's oldest running request, whose response has its images so far."""
    jobs.interrupt(owner_of(request))
    return {}


def _translated(body: Txt2Img, service: Service, checkpoint: str | None) -> Translated:
    states = service.model_states()
    asked = body.override_settings.get("sd_model_checkpoint")
    name = named(asked, states) if isinstance(asked, str) and asked else checkpoint
    state = chosen(name, states)
    if state is None or state.model is None:
        return translated(body, name, None, LATENT_CELL, USUAL_SIZE, None, None, None)
    adapters = {one.name for one in state.model.adapters.available()}
    facts = state.model.facts
    size = facts.default_width, facts.default_height
    return translated(
        body,
        name,
        adapters,
        facts.size_multiple,
        size,
        {one.name for one in state.model.embeddings.available()},
        [one.name for one in state.model.controls.available()],
        [one.name for one in state.model.image_prompts.available()],
    )


async def _made(
    service: Service,
    wanted: Translated,
    job: ClientJob,
    identifier: str,
    client: Client,
    share: Share,
) -> tuple[Generation | None, tuple[Picture, ...]]:
    """Generate images; after an interruption return the finished ones, and previews of others."""
    request, region = wanted.request, None
    if wanted.padding is not None:
        service.check_room(client)
        request, region = await crop_to_mask(
            request, wanted.padding, wanted.size, service.decoding, share.hold
        )
    if job.interrupted:
        return None, ()
    try:
        generation = await service.admit(request, identifier, client)
    except Cancelled:
        if job.interrupted:
            return None, ()
        raise
    try:
        await job.follow(generation)
        if region is None:
            return generation, (await service.pictures(generation)).pictures
        pictures = await _so_far(service, generation, job, region)
        generation.complete()
        return generation, pictures
    except Cancelled:
        if not job.interrupted:
            raise
        return generation, await _so_far(service, generation, job, region)
    finally:
        service.release(generation)


async def _so_far(
    service: Service, generation: Generation, job: ClientJob, region: Region | None
) -> tuple[Picture, ...]:
    size = generation.request.drawn_size
    parts: dict[int, Callable[[], NDArray[np.uint8]]] = {
        index: partial(resized, one.preview, *size)
        for index, one in job.progress.items()
        if one.preview is not None
    }
    for index, result in generation.results.items():
        parts[index] = partial(np.asarray, result.pixels)
    pictures: list[Picture] = []
    # One after the other, since with a region each has the size of the picture that was sent.
    for index in sorted(parts):
        pixels = await asyncio.to_thread(parts[index])
        if region is not None:
            pixels = await asyncio.to_thread(region.put_back, pixels)
        pictures += await service.encoded(generation, {index: pixels})
    return tuple(pictures)

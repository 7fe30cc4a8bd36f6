"""Serves one request in this process, with its own engine and without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.heap import gc_frozen
from server.models.folder import embedded_folders
from server.requests.schema import GenerateRequest
from server.service.generation import Progress
from server.service.hosting import Hosted, ProgressCallback, host
from server.service.pictures import Pictures
from server.service.service import Service
from server.settings import Settings

__all__ = ["generate"]

POLL_S = 0.05
ENGINE_STOP_S = 10.0

GUESSED_COSTS = {1: 0.05, 64: 0.5}
"""Seconds of a tick by rows, by which a few images run together; ticks correct them."""


async def generate(
    settings: Settings,
    request: GenerateRequest,
    on_progress: Callable[[Progress], None],
    on_loading: ProgressCallback,
) -> Pictures:
    """Load the request's model, generate its images, and stop.

    Args:
        settings: settings with the models and the device.
        request: request for images.
        on_progress: callback for the progress of images.
        on_loading: callback for progress before, called with what is being loaded, how much of it
            is done, and of how much.

    Raises:
        WeftError: the model cannot be hosted, or the request cannot be served.
    """
    # A fixed number of rows per tick must be chosen from measurements.
    measured = settings.deterministic and settings.row_budget is None
    guessed = None if measured else GUESSED_COSTS
    # Compiled programs pay off for many images: loading them takes longer than drawing one without.
    one = _of_one_model(settings, request.model).model_copy(update={"compile": False})
    with gc_frozen():
        hosted = await asyncio.to_thread(host, one, guessed_costs=guessed, on_progress=on_loading)
    try:
        on_loading("warming up", 0, 0)
        return await _follow(hosted, settings, request, on_progress)
    finally:
        await asyncio.to_thread(hosted.engine.stop, ENGINE_STOP_S)


def _of_one_model(settings: Settings, name: str | None) -> Settings:
    """Settings with only the model of that name, or the default one; unchanged if it is unknown."""
    folders = settings.model_folders(embedded_folders())
    name = next(iter(folders)) if name is None else name
    if name not in folders:
        return settings
    only = (f"{name}={folders[name]}",)
    return settings.model_copy(update={"models": only, "models_folder": None})


async def _follow(
    hosted: Hosted,
    settings: Settings,
    request: GenerateRequest,
    on_progress: Callable[[Progress], None],
) -> Pictures:
    service = Service(settings.limits, decode_processes=1)
    service.open(hosted.engine, hosted.models)
    try:
        return await _served(service, request, on_progress)
    finally:
        service.close()


async def _served(
    service: Service, request: GenerateRequest, on_progress: Callable[[Progress], None]
) -> Pictures:
    while not service.ready and service.broken is None:  # noqa: ASYNC110 - a thread's state
        await asyncio.sleep(POLL_S)
    generation = await service.admit(request, "command-line")
    try:
        while not generation.done:
            for progress in await generation.news():
                on_progress(progress)
        return await service.pictures(generation)
    finally:
        service.release(generation)

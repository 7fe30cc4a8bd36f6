"""Construction of the FastAPI application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from importlib.metadata import version
from threading import Thread
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from server.errors import NotReady, WeftError
from server.http import documents, errors, health, results
from server.http.automatic1111 import controlnet as automatic1111_controlnet
from server.http.automatic1111 import extras as automatic1111_extras
from server.http.automatic1111 import images as automatic1111_images
from server.http.automatic1111 import settings as automatic1111_settings
from server.http.automatic1111 import weights as automatic1111_weights
from server.http.automatic1111.checkpoints import Checkpoints
from server.http.automatic1111.jobs import ClientJobs
from server.http.body import Bodies
from server.http.drain import DrainMiddleware
from server.http.gate import Gate, RequestId, needs_key
from server.http.head import HeadAsGet
from server.http.headers import SafeHeaders
from server.http.live import events as stream_events
from server.http.live import stream
from server.http.metrics import exposition
from server.http.native import catalog, generate, models, rows
from server.http.openai import images as openai_images
from server.http.predictions import routes as predictions
from server.http.predictions.answers import predicted
from server.results import Results
from server.service.hosting import host
from server.service.service import Service
from server.service.streams import Streams
from server.settings import Settings

__all__ = ["create_app"]

log = logging.getLogger("weft")

ENGINE_STOP_S: Final = 1.5
"""Seconds for a running tick to end when the server stops; its images have been abandoned by
then."""

FAILURE_GRACE_S: Final = 5.0
"""Seconds from the engine's failure to the end of the process, in which clients and probes can
learn of it."""


def create_app(
    settings: Settings,
    *,
    on_failure: Callable[[], None] | None = None,
    while_loading: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> FastAPI:
    """Create the application and its engine, which loads while `/livez` already answers.

    Args:
        settings: settings of the operator.
        on_failure: function that is called when the server can never serve: if the models cannot be
            loaded, or some seconds after the engine or its device failed, in which `/livez` reports
            the failure.
        while_loading: function that makes the context in which the models are loaded.
    """
    app = FastAPI(
        title="Weft",
        version=version("weft"),
        summary="A diffusion server: each request chooses its own sampler and guidance, and all "
        "requests share one batch.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(settings, on_failure, while_loading),
        middleware=_middleware(settings),
    )
    app.state.settings = settings
    app.state.service = Service(
        settings.limits, decode_processes=settings.decode_processes, load_s=settings.load_s
    )
    app.state.bodies = Bodies(settings.bodies_bytes)
    app.state.streams = Streams(app.state.service, settings)
    app.state.automatic1111_jobs = ClientJobs(app.state.service)
    app.state.automatic1111_checkpoints = Checkpoints()
    app.state.enlarging = asyncio.Lock()
    app.state.jobs = _jobs(settings, app.state.service)
    # The jobs are dropped if they cannot be opened.
    app.state.exposition = exposition(app.state.service, app.state.streams, lambda: app.state.jobs)
    app.state.results = Results(
        settings.place_of_results, settings.results.keep_s, settings.results.total_bytes
    )
    errors.install(app)
    for router in (
        generate.router,
        openai_images.generations,
        openai_images.edits,
        predictions.router,
        models.router,
        automatic1111_images.router,
        automatic1111_extras.router,
        automatic1111_settings.router,
        automatic1111_weights.router,
        automatic1111_controlnet.router,
        stream_events.router,
        rows.router,
        results.router,
        catalog.router,
        health.router,
    ):
        # Not set for the whole application, where the limit would be enforced before the gate and
        # answered in plain text.
        app.include_router(router, max_body_size=settings.limits.body_bytes)
    app.include_router(stream.router)
    app.include_router(documents.router)
    _complete_schema(app, settings)
    return app


def _jobs(settings: Settings, service: Service) -> Any:
    """Durable jobs; None if they are off."""
    if not settings.jobs.on:
        return None
    # Its dependencies are optional.
    from server.jobs.jobs import Jobs

    return Jobs(settings, service, lambda job: predicted(job).model_dump_json().encode())


async def _opened(app: FastAPI, settings: Settings) -> bool:
    """Open the stores that the operator configured; False if that failed, which ends the server."""
    service: Service = app.state.service
    try:
        if app.state.jobs is not None:
            await app.state.jobs.open()
    except NotReady as error:
        log.critical("durable jobs cannot be opened: %s", error.message)
        service.give_up("Durable jobs could not be opened; the server's log says why.")
        return False
    try:
        if settings.place_of_results is not None:
            await app.state.results.open()
    except NotReady as error:
        log.critical("%s", error.message)
        service.give_up("Images cannot be kept for URLs; the server's log says why.")
        return False
    return True


def _middleware(settings: Settings) -> list[Middleware]:
    gate = Middleware(Gate, settings=settings, answer=errors.answer)
    outer = [
        Middleware(HeadAsGet),
        Middleware(SafeHeaders),
        Middleware(RequestId),
        Middleware(DrainMiddleware, answer=errors.answer),
    ]
    if not settings.allowed_origins:
        return [*outer, gate]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "POST", "DELETE"],
        # The operator trusts these pages, and clients send headers of their own, OpenAI's SDK a
        # dozen.
        allow_headers=["*"],
        expose_headers=["x-request-id", "x-seed", "retry-after"],
    )
    # A preflight carries no key: it is answered before the gate asks for one.
    return [*outer, cors, gate]


def _lifespan(
    settings: Settings,
    on_failure: Callable[[], None] | None,
    while_loading: Callable[[], AbstractContextManager[None]],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service: Service = app.state.service
        loop = asyncio.get_running_loop()

        def failed(after_s: float) -> None:
            # If the loop is closed, the server is ending anyway.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(service.drain)
                loop.call_soon_threadsafe(service.abandon)
                if on_failure is not None:
                    loop.call_soon_threadsafe(loop.call_later, after_s, on_failure)

        # Not in the loop's executor, whose threads the process joins when it ends: nothing
        # interrupts the loading of a large model.
        opening = service, settings, failed, while_loading
        loading = Thread(target=_open, args=opening, daemon=True)
        if await _opened(app, settings):
            loading.start()
        else:
            app.state.jobs = None
            failed(0)
        try:
            yield
        finally:
            service.drain()
            if app.state.jobs is not None:
                await app.state.jobs.close()
            await app.state.results.close()
            service.abandon()
            service.close()
            if service.engine is not None:
                await asyncio.to_thread(service.engine.stop, 0, ENGINE_STOP_S)

    return lifespan


def _open(
    service: Service,
    settings: Settings,
    failed: Callable[[float], None],
    while_loading: Callable[[], AbstractContextManager[None]],
) -> None:
    """Load the models and open the service to requests; call `failed` if they cannot be loaded."""
    try:
        with while_loading():
            hosted = host(settings, lambda: failed(FAILURE_GRACE_S))
    except BaseException as error:
        known = isinstance(error, WeftError)
        log.critical("the models could not be loaded: %s", error, exc_info=not known)
        service.give_up("The models could not be loaded; the server's log says why.")
        failed(0)
        return
    service.open(hosted.engine, hosted.models, hosted.source)
    if service.leaving.is_set():
        hosted.engine.stop(0)


def _complete_schema(app: FastAPI, settings: Settings) -> None:
    """Add the operator's limits, at the fields they apply to, and the API keys to the schema."""
    generic = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generic()
        fields = schema["components"]["schemas"]["GenerateRequest"]["properties"]
        fields["n"]["maximum"] = settings.limits.images
        for variant in fields["steps"]["anyOf"]:
            if variant.get("type") == "integer":
                variant["maximum"] = settings.limits.steps
        if settings.api_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            for path in schema["paths"]:
                if not needs_key(path):
                    schema["paths"][path]["get"]["security"] = []
        return schema

    app.openapi = openapi

"""Generation for requests that are not streamed, cancelled if the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from server.engine.client import Client
from server.http.dependencies import client_of
from server.requests.schema import GenerateRequest
from server.service.generation import Generation
from server.service.pictures import Pictures
from server.service.service import Service

__all__ = ["cancel_on_disconnect", "make"]

Made = TypeVar("Made")


async def make(
    request: Request, service: Service, body: GenerateRequest, identifier: str
) -> tuple[Generation, Pictures] | None:
    """Generate images; return None if the client disconnects first, which cancels the work.

    Args:
        request: HTTP request, whose connection is watched and whose key determines the client.
        service: service that makes the images.
        body: request for the images.
        identifier: identifier of the generation.

    Raises:
        WeftError: the errors of :meth:`Service.admit` and :meth:`Service.pictures`.
    """
    work = _made(service, body, identifier, client_of(request))
    return await cancel_on_disconnect(request, work)


async def _made(
    service: Service, body: GenerateRequest, identifier: str, client: Client
) -> tuple[Generation, Pictures]:
    generation = await service.admit(body, identifier, client)
    try:
        return generation, await service.pictures(generation)
    finally:
        service.release(generation)


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Made]) -> Made | None:
    """Return the result of `work`; None if the client disconnects first, which cancels the work."""
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

"""`/v1/images`: generation and editing in OpenAI's format."""

from __future__ import annotations

import json
from asyncio import to_thread
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from typing_extensions import override

from server.errors import InvalidRequest, WeftError
from server.http.body import JsonRoute
from server.http.dependencies import IdentifierDep, ServiceDep, client_of
from server.http.errors import ErrorBody, body_of
from server.http.forms import FormRoute
from server.http.making import cancel_on_disconnect, make
from server.http.native.events import PING_S, GenerationStream
from server.http.openai.answers import Event, ImagesAnswer, Kind, answered, finished, previewed
from server.http.results import links_to
from server.requests.openai_images import (
    ImageEdit,
    ImageGeneration,
    request_of,
    with_referenced_images,
)
from server.requests.schema import GenerateRequest
from server.service.generation import Generation, Progress
from server.service.own_mask import with_own_mask
from server.service.service import Service

__all__ = ["edits", "generations"]

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **{
        status: {"model": ErrorBody}
        for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 503, 507)
    },
}


class EditRoute(FormRoute):
    """A route whose JSON may contain images as OpenAI's JSON does: as references by URL."""

    @override
    def narrowed(self, parsed: Any) -> Any:
        return with_referenced_images(parsed)


generations = APIRouter(tags=["openai"], route_class=JsonRoute)
edits = APIRouter(tags=["openai"], route_class=EditRoute)


@generations.post("/v1/images/generations", response_model=ImagesAnswer, responses=_RESPONSES)
async def generate(
    body: ImageGeneration, request: Request, service: ServiceDep, identifier: IdentifierDep
) -> Any:
    """Generate images, like OpenAI's route of the same path.

    With `stream` the events are `image_generation.partial_image`, as many as `partial_images` says,
    and `image_generation.completed` for each image.
    """
    wanted, ignored = await to_thread(request_of, body, service.hosts)
    return await _answer("image_generation", body, wanted, ignored, request, service, identifier)


@edits.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    responses=_RESPONSES,
    openapi_extra={
        "requestBody": {
            "content": {
                "multipart/form-data": {"schema": {"$ref": "#/components/schemas/ImageEdit"}}
            }
        }
    },
)
async def edit(
    body: ImageEdit, request: Request, service: ServiceDep, identifier: IdentifierDep
) -> Any:
    """Edit an image, like OpenAI's route of the same path: transparent pixels are repainted.

    The names of a stream's events begin with `image_edit` instead of `image_generation`.
    """
    wanted, ignored = await to_thread(request_of, body, service.hosts)
    # Before anything is decoded.
    service.check_room(client_of(request))
    wanted = await with_own_mask(wanted, service.decoding)
    return await _answer("image_edit", body, wanted, ignored, request, service, identifier)


async def _answer(
    kind: Kind,
    body: ImageGeneration,
    wanted: GenerateRequest,
    ignored: Sequence[str],
    request: Request,
    service: Service,
    identifier: str,
) -> Response:
    if body.stream and wanted.response_format == "url":
        raise InvalidRequest(
            "response_format",
            "response_format is 'url', but the events of a stream contain the images; leave it "
            "out, or set stream to false.",
        )
    if body.stream:
        admitting = service.admit(wanted, identifier, client_of(request))
        generation = await cancel_on_disconnect(request, admitting)
        if generation is None:
            return Response(status_code=499)
        return ImagesStream(kind, service, generation, body.partial_images, ignored)
    made = await make(request, service, wanted, identifier)
    if made is None:
        return Response(status_code=499)
    generation, pictures = made
    links = None
    if wanted.response_format == "url":
        links = await links_to(request, pictures.pictures, generation.request.output_format)
    answer = answered(generation, pictures, links, ignored)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


class ImagesStream(GenerationStream):
    """The event stream of one generation: previews of the first image, and then all images.

    Args:
        kind: beginning of the events' names.
        service: service that makes the images.
        generation: admitted generation.
        previews: maximum number of previews.
        ignored: sentences about fields without effect.
    """

    def __init__(
        self,
        kind: Kind,
        service: Service,
        generation: Generation,
        previews: int,
        ignored: Sequence[str],
    ) -> None:
        self._kind: Kind = kind
        self._previews = previews
        self._ignored = ignored
        super().__init__(service, generation)

    @override
    async def _events(self) -> AsyncIterator[bytes]:
        generation, kind = self._generation, self._kind
        shown = 0
        try:
            while not generation.done:
                news = await generation.news(PING_S)
                for progress in news:
                    if progress.preview is None or not self._due(progress, shown):
                        continue
                    event = await to_thread(previewed, kind, generation, shown, progress.preview)
                    yield _event(event)
                    shown += 1
                if not news and not generation.done:
                    yield KEEPALIVE_COMMENT
            pictures = await self._service.pictures(generation)
            for picture in pictures.pictures:
                yield _event(finished(kind, generation, picture, self._ignored))
        except WeftError as error:
            data = {"type": "error", **body_of(error)}
            yield format_sse_event(event="error", data_str=json.dumps(data))

    def _due(self, progress: Progress, shown: int) -> bool:
        """Return whether the next preview is due; previews divide the steps evenly."""
        if progress.index != 0 or shown == self._previews:
            return False
        share = (shown + 1) / (self._previews + 1)
        return share * progress.steps <= progress.step < progress.steps


def _event(event: Event) -> bytes:
    return format_sse_event(event=event.type, data_str=event.model_dump_json(exclude_none=True))

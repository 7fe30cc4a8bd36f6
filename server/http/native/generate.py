"""`/v1/generate`: images from a prompt, as JSON, as an image file or as a stream of events."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from server.http.body import JsonRoute
from server.http.dependencies import IdentifierDep, ServiceDep, client_of
from server.http.errors import ErrorBody
from server.http.making import cancel_on_disconnect, make
from server.http.native.answers import CancelResponse, GenerateResponse, completed
from server.http.native.events import GenerationStream, Linking
from server.http.native.negotiation import negotiate
from server.http.results import Link, links_to
from server.image_codec import MEDIA_TYPES
from server.requests.schema import GenerateRequest
from server.service.generation import Generation
from server.service.pictures import Pictures

__all__ = ["router"]

router = APIRouter(tags=["generate"], route_class=JsonRoute)

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 503, 507)
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
)
async def generate(
    body: GenerateRequest, request: Request, service: ServiceDep, identifier: IdentifierDep
) -> Any:
    """Generate images.

    The `Accept` header chooses the form of the response: JSON; `image/png`, `image/jpeg` or
    `image/webp` for one image file; `text/event-stream` (or `stream: true`) for the events
    `queued`, `position` while it waits, `progress`, and `completed` or `error`. Disconnecting
    cancels the generation.

    The header `x-request-id` of the request (1 to 64 letters, digits, dots, dashes, underscores)
    becomes the generation's id, so that `DELETE /v1/generate/{id}` can cancel it at once; without
    that header the response and the `queued` event contain the id.
    """
    wanted, body = negotiate(request.headers.get("accept", ""), body)
    if wanted == "events":
        admitting = service.admit(body, identifier, client_of(request))
        generation = await cancel_on_disconnect(request, admitting)
        if generation is None:
            return Response(status_code=499)
        return GenerationStream(service, generation, _links(request, body))
    made = await make(request, service, body, identifier)
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
    answer = completed(generation, pictures, await _links(request, body)(generation, pictures))
    return Response(answer.model_dump_json(), media_type="application/json")


def _links(request: Request, body: GenerateRequest) -> Linking:
    """Return the function that gives the images of a request URLs, if it asks for them."""

    async def linked(generation: Generation, pictures: Pictures) -> list[Link] | None:
        if body.response_format != "url":
            return None
        return await links_to(request, pictures.pictures, generation.request.output_format)

    return linked


@router.delete("/v1/generate/{identifier}", responses={404: {"model": ErrorBody}})
async def cancel(
    identifier: Annotated[str, Path(max_length=64)], service: ServiceDep
) -> CancelResponse:
    """Cancel a running generation; its request gets an error with the code `cancelled`.

    A generation that has just completed is not cancelled; the response is then 404.
    """
    service.cancel(identifier)
    return CancelResponse(id=identifier, cancelled=True)

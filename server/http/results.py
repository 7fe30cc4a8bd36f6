"""`/v1/results`: images that responses contain as URLs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from server.http.dependencies import owner_of
from server.http.errors import ErrorBody
from server.http.gate import RESULTS
from server.image_codec import MEDIA_TYPES, OutputFormat
from server.results import Results
from server.service.pictures import Picture

__all__ = ["Link", "links_to", "router"]

router = APIRouter(tags=["generate"])

FORMATS: Final = {f".{name}": media for name, media in MEDIA_TYPES.items()}


class Link(NamedTuple):
    """URL of a stored image.

    Attributes:
        url: URL of the image.
        expires_at: Unix time at which it expires.
    """

    url: str
    expires_at: int


async def links_to(
    request: Request, pictures: Sequence[Picture], output_format: OutputFormat
) -> list[Link]:
    """Store images and return the URL of each.

    Args:
        request: HTTP request of the client that the images are for.
        pictures: images.
        output_format: format of their files.

    Raises:
        InvalidRequest: the images are larger than the limit for all stored images.
        NotReady: the images cannot be stored.
    """
    files = [picture.data for picture in pictures]
    kept = await _results(request).keep(owner_of(request), output_format, files)
    base = request.app.state.settings.results.base_url or str(request.base_url)
    return [Link(f"{base.rstrip('/')}{RESULTS}{one.name}", one.expires_at) for one in kept]


@router.get(
    RESULTS + "{name}",
    response_class=Response,
    responses={
        200: {
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in MEDIA_TYPES.values()
            }
        },
        404: {"model": ErrorBody},
        503: {"model": ErrorBody},
    },
)
async def result(name: Annotated[str, Path(max_length=64)], request: Request) -> Response:
    """Fetch an image that a response contained as a URL, until it expires; needs no key."""
    data, left_s = await _results(request).read(name)
    media = FORMATS[name[name.rindex(".") :]]
    headers = {
        "cache-control": f"private, max-age={int(left_s)}, immutable",
        # For the origins that the gate lets in: the page's may differ from that of the images.
        "access-control-allow-origin": "*",
    }
    return Response(data, media_type=media, headers=headers)


def _results(request: Request) -> Results:
    return request.app.state.results

"""Content negotiation: chooses the form of the response from the Accept header and the body."""

from __future__ import annotations

from typing import Literal

from server.errors import InvalidRequest, NotAcceptable
from server.image_codec import MEDIA_TYPES, OutputFormat
from server.requests.schema import GenerateRequest

__all__ = ["Wanted", "negotiate"]

Wanted = Literal["json", "events", "image"]


def negotiate(accept: str, body: GenerateRequest) -> tuple[Wanted, GenerateRequest]:
    """Choose the form of the response, and set the request's format and stream to match.

    Args:
        accept: Accept header.
        body: request as sent.

    Raises:
        NotAcceptable: no accepted media type is supported.
        InvalidRequest: the body and the header contradict each other.
    """
    wanted, image = _first_known(accept or "*/*")
    if wanted == "image":
        return "image", _as_bytes(body, image)
    if wanted == "events" or body.stream:
        return "events", body.model_copy(update={"stream": True})
    return "json", body


def _first_known(accept: str) -> tuple[Wanted, OutputFormat | None]:
    for media in _by_preference(accept):
        if media == "text/event-stream":
            return "events", None
        if media in ("application/json", "application/*", "*/*"):
            return "json", None
        if media == "image/*":
            return "image", None
        for name, known in MEDIA_TYPES.items():
            if media == known:
                return "image", name
    offered = ", ".join(("application/json", "text/event-stream", *MEDIA_TYPES.values()))
    raise NotAcceptable("accept", f"accept is {accept[:60]!r}; allowed are: {offered}.")


def _by_preference(accept: str) -> list[str]:
    """Return the media types, the most preferred first, without those of weight 0."""
    weighted: list[tuple[float, str]] = []
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        weights = [piece[2:] for piece in parameters if piece.startswith("q=")]
        try:
            weight = float(weights[0]) if weights else 1.0
        except ValueError:
            weight = 1.0
        if weight > 0:
            weighted.append((weight, media))
    return [media for _, media in sorted(weighted, key=lambda one: -one[0])]


def _as_bytes(body: GenerateRequest, image: OutputFormat | None) -> GenerateRequest:
    if body.stream:
        raise InvalidRequest(
            "stream",
            "stream is true, but an image/* response cannot be streamed; set stream to false or "
            "accept text/event-stream.",
        )
    if body.n != 1:
        raise InvalidRequest(
            "n",
            f"n is {body.n}, but an image/* response holds one image; set n to 1 or accept "
            "application/json.",
        )
    if body.response_format == "url":
        raise InvalidRequest(
            "response_format",
            "response_format is 'url', but an image/* response is the image itself; leave it out "
            "or accept application/json.",
        )
    if image is None:
        return body
    if "output_format" in body.model_fields_set and body.output_format != image:
        raise InvalidRequest(
            "output_format",
            f"output_format is {body.output_format!r}, but the Accept header asks for "
            f"{MEDIA_TYPES[image]}; leave one out.",
        )
    return body.model_copy(update={"output_format": image})

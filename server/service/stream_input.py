"""Decoding of live streams' input frames at the sizes at which their model reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.decoding.pool import DecodePool
from server.decoding.sizing import PictureTarget
from server.errors import InvalidRequest
from server.models.hosted import ModelFacts
from server.requests.reference_images import max_reference_images, seen_target_of, target_of
from server.requests.schema import ResolvedRequest
from server.requests.stream_schema import StreamSettings

__all__ = ["FramePixels", "check_source", "decoded_frame"]


class FramePixels(NamedTuple):
    """An input frame, uint8 `[H, W, 3]`.

    Attributes:
        read: frame as the denoiser reads it.
        seen: frame as the text encoder sees it, if it does.
    """

    read: NDArray[np.uint8]
    seen: NDArray[np.uint8] | None = None


def check_source(settings: StreamSettings, facts: ModelFacts) -> None:
    """Refuse settings that a stream's source cannot serve, in terms of what a client can change.

    Args:
        settings: settings of the stream.
        facts: facts of the model that will serve it.

    Raises:
        InvalidRequest: guidance needs the picture that an image starts from, but images start from
            none; or the model reads no reference images, or no more than those given beside each
            frame.
    """
    policy = None if settings.guidance is None else settings.guidance.policy
    if policy is not None and policy.wants_reference and settings.source != "frames":
        instead = policy.without_reference
        raise InvalidRequest(
            "guidance.policy",
            f"guidance.policy is {policy.name!r}, which with these parameters needs frames to "
            f"start from, and source is {settings.source!r}; set source to 'frames'"
            + (f", or {instead}." if instead else "."),
        )
    max_images, beside = max_reference_images(facts), len(settings.reference_images)
    if beside and not max_images:
        raise InvalidRequest(
            "reference_images",
            f"reference_images has {beside}, but model {facts.name!r} does not read reference "
            "images; leave it out, or send a picture as an input frame with source 'frames'.",
        )
    if settings.source != "references":
        return
    if not max_images:
        raise InvalidRequest(
            "source",
            f"source is 'references', but model {facts.name!r} does not read reference images; use "
            "'frames' to start from each frame.",
        )
    if beside >= max_images:
        raise InvalidRequest(
            "reference_images",
            f"reference_images has {beside} images besides each frame; model {facts.name!r} reads "
            f"at most {max_images} with the frame.",
        )


async def decoded_frame(
    data: bytes,
    settings: StreamSettings,
    request: ResolvedRequest,
    facts: ModelFacts,
    decoding: DecodePool,
) -> FramePixels:
    """Decode an input frame.

    Args:
        data: a PNG, JPEG or WebP file.
        settings: settings of the stream.
        request: request for one output frame.
        facts: facts of the model that serves it.
        decoding: pool that decodes the file.

    Raises:
        InvalidRequest: it cannot be decoded.
    """
    if settings.source == "frames":
        return FramePixels(await decoding.frame(data, PictureTarget(request.width, request.height)))
    read, of_text = await decoding.frame(data, target_of(facts)), seen_target_of(facts)
    if of_text is None:
        return FramePixels(read)
    return FramePixels(read, await decoding.frame(data, of_text))

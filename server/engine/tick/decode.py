"""From clean latents to pixels, several images at once."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

import torch

from server.engine.state.sequence import ImageResult
from server.engine.tick.preview import to_uint8
from server.errors import RowFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from server.engine.state.sequence import Sequence

log = logging.getLogger(__name__)

DECODED_AT_ONCE = 4


def decode(
    done: list[Sequence], *, fixed: bool
) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
    """Decode finished images of one lane, a few at a time.

    Args:
        done: images whose slot 0 is the clean latent, all of one lane.
        fixed: always decode the same number, so that a picture's bits do not depend on how many
            finished with it.

    Yields:
        Each image with its result, or with the error that is its own.
    """
    for first in range(0, len(done), DECODED_AT_ONCE):
        yield from _decode_some(done[first : first + DECODED_AT_ONCE], fixed=fixed)


def _decode_some(
    some: list[Sequence], *, fixed: bool
) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
    try:
        pictures = _pictures(some, fixed=fixed)
        finite = pictures.flatten(1).sum(1).isfinite().tolist()
        pixels = to_uint8(pictures)
    except Exception as error:
        if len(some) == 1:
            log.exception("an image failed in decoding")
            yield some[0], error
            return
        for one in some:
            yield from _decode_some([one], fixed=fixed)
        return
    now = monotonic()
    for sequence, sound, picture in zip(some, finite, pixels, strict=True):
        if not sound:
            yield sequence, RowFailed("The image became NaN or infinite while it was decoded.")
            continue
        yield (
            sequence,
            ImageResult(
                pixels=picture,
                evaluations=sequence.evaluations,
                saved=sequence.saved,
                queue_s=sequence.started_at - sequence.submitted_at,
                denoise_s=sequence.denoised_at - sequence.started_at,
                decode_s=now - sequence.denoised_at,
                ancestor=sequence.ancestor,
                effective=tuple(sequence.effective),
            ),
        )


def _pictures(some: list[Sequence], *, fixed: bool) -> Tensor:
    lane = some[0].lane
    slots = [sequence.slot for sequence in some]
    filler = [slots[0]] * (DECODED_AT_ONCE - len(slots)) if fixed else []
    rows = torch.tensor(slots + filler, device=lane.model.device)
    latents = lane.pool.columns[:, 0].index_select(0, rows)
    pictures = lane.model.decode(latents)[: len(some)]
    for i, sequence in enumerate(some):
        image, mask = sequence.task.image, sequence.task.mask
        if image is not None and mask is not None:
            # What the user asked to keep is kept to the pixel, not through the autoencoder.
            pictures[i] = torch.lerp(image.to(pictures), pictures[i], mask.to(pictures))
    return pictures

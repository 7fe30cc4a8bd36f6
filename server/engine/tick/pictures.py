"""Encoding of uploaded pictures to latents: once per request, batched over requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from server.engine.faults import attempt, free_memory, is_out_of_memory
from server.engine.state.padding import padded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, MutableMapping

    from torch import Tensor

    from server.engine.state.sequence import Sequence
    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

ENCODER_BATCH = 4
"""Maximum number of pictures in one encoder call; the fixed number in deterministic mode."""


PIXELS_A_TICK = 1024 * 1024
"""Maximum pixels of ordinary images' pictures encoded before a tick; one picture may have more."""

MIN_PIXELS = 64 * 64
"""Number of pixels whose encoding costs about as much as that of a prompt."""


class TickPictures:
    """The pictures to encode before one tick; the tick waits for them."""

    def __init__(self) -> None:
        self._pixels: dict[tuple[int, int], int] = {}
        self._by_image: dict[Sequence, int] = {}

    def take(self, sequence: Sequence, *, due: bool) -> bool:
        """Reserve room for the pictures of an ordinary image; return whether there was room.

        Args:
            sequence: image that would be admitted before this tick.
            due: whether it is its flow's turn; if not, there is room only if it has no picture to
                encode.
        """
        request = sequence.submission
        pictures = [one for one in _pictures(sequence) if id(one) not in request.latents]
        # ControlNets and IP-Adapters encode theirs differently, which takes about as long.
        steering = [use.picture for use in sequence.task.controls if id(use) not in request.hints]
        prompts = sequence.task.image_prompts
        shown = [use.pictures for use in prompts if id(use) not in request.shown]
        steering += [picture for pictures in shown for picture in pictures]
        own = {
            (id(request), id(picture)): picture.shape[-2] * picture.shape[-1]
            for picture in (*pictures, *steering)
        }
        new = {key: pixels for key, pixels in own.items() if key not in self._pixels}
        taken = sum(self._pixels.values())
        if new and (not due or (taken and taken + sum(new.values()) > PIXELS_A_TICK)):
            return False
        self._pixels |= new
        self._by_image[sequence] = sum(new.values())
        return True

    def parts(self, sequences: Iterable[Sequence]) -> dict[Sequence, float]:
        """Share of each image in the work of admitting them, in pixels."""
        return {one: max(MIN_PIXELS, self._by_image.get(one, 0)) for one in sequences}


def encode_pictures(
    model: HostedModel,
    members: list[Sequence],
    kept: MutableMapping[Tensor, Tensor],
    encode: Callable[[Tensor], Tensor],
    *,
    fixed: bool,
) -> None:
    """Store the latents of all pictures of some images with their submissions.

    The images of a submission share a picture, which is encoded for the first of them. The frames
    of a live stream share the reference images of its settings in the same way.

    Args:
        model: model of all the images.
        members: images that start now.
        kept: latents of reference images of this model that were encoded before, by picture; new
            ones are added.
        encode: function that replaces ``HostedModel.encode_image``.
        fixed: whether to encode at a fixed batch size, so that a picture's bits do not depend on
            the other pictures of its batch.

    Raises:
        DeviceLost: the device no longer answers.
    """
    wanted: dict[tuple[int, int], tuple[Sequence, Tensor]] = {}
    for sequence in members:
        latents = sequence.submission.latents
        for picture in _pictures(sequence):
            if picture in kept:
                latents[id(picture)] = kept[picture]
            elif id(picture) not in latents:
                wanted[id(sequence.submission), id(picture)] = sequence, picture
    alike: dict[torch.Size, list[tuple[Sequence, Tensor]]] = {}
    for sequence, picture in wanted.values():
        alike.setdefault(picture.shape, []).append((sequence, picture))
    for of_a_size in alike.values():
        pictures = [picture for _, picture in of_a_size]
        outcomes = encoded(pictures, encode, model.device, fixed=fixed)
        for (sequence, picture), outcome in zip(of_a_size, outcomes, strict=True):
            sequence.submission.latents[id(picture)] = outcome
            refers = any(picture is one for one in sequence.task.references)
            if refers and not isinstance(outcome, Exception):
                kept[picture] = outcome


def encoded(
    pictures: list[Tensor],
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    fixed: bool,
) -> Iterator[Tensor | Exception]:
    """Encode pictures in batches; yield the result of each, or its own error.

    Args:
        pictures: pictures of one size.
        encode: function that encodes a stack of pictures on the device.
        device: device of the encoder.
        fixed: whether to encode at a fixed batch size, so that a picture's bits do not depend on
            the other pictures of its batch.

    Raises:
        DeviceLost: the device no longer answers.
    """
    for first in range(0, len(pictures), ENCODER_BATCH):
        chunk = pictures[first : first + ENCODER_BATCH]
        yield from _encoded(chunk, encode, device, fixed=fixed)


def latents_of(sequence: Sequence, picture: Tensor) -> Tensor:
    """Latents ``[C, h, w]`` of a picture that was encoded.

    Raises:
        Exception: the error that encoding it ended in.
    """
    found = sequence.submission.latents[id(picture)]
    if isinstance(found, Exception):
        raise found
    return found


def _pictures(sequence: Sequence) -> Iterable[Tensor]:
    task = sequence.task
    pictures = [task.image, *(term.picture for term in task.terms), *task.references]
    return [picture for picture in pictures if picture is not None]


def _encoded(
    pictures: list[Tensor],
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    fixed: bool,
) -> Iterator[Tensor | Exception]:
    """Encode a batch; on an error split it in halves, until the error is one picture's."""
    rows = ENCODER_BATCH if fixed else None
    made = attempt(
        lambda: encode(padded(torch.stack(pictures).to(device), rows)),
        device,
    )
    if not isinstance(made, Exception):
        # Copies: a view would keep the whole batch alive.
        yield from (one.clone() for one in made[: len(pictures)])
        return
    if is_out_of_memory(made):
        free_memory(device)
    if len(pictures) == 1:
        log.error("a picture could not be encoded", exc_info=made)
        yield made
        return
    half = len(pictures) // 2
    yield from _encoded(pictures[:half], encode, device, fixed=fixed)
    yield from _encoded(pictures[half:], encode, device, fixed=fixed)

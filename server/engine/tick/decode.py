"""Decoding of clean latents to pixels, concurrent with the ticks of images still under way."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from server.engine.decoder_stream import on_decoder_stream
from server.engine.fair_queue import MAX_LEAD_S
from server.engine.faults import attempt, is_out_of_memory
from server.engine.tick.decoder_queue import DecoderQueue
from server.engine.tick.host_copy import HostCopy
from server.engine.tick.preview import to_uint8
from server.engine.tick.stopwatch import Stopwatch
from server.engine.tick.undecoded import undecoded
from server.errors import RowFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.fair_queue import Turns
    from server.engine.state.sequence import ImageResult, Sequence
    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

DECODER_BATCH = 4
"""Maximum number of pictures in one decoder call of a GPU while ticks run; the fixed number of
pictures in deterministic mode."""

MAX_DECODER_PIXELS = 4 * 512 * 512
"""Maximum number of pixels in such a call, and of the ordinary pictures that a CPU decodes between
two ticks. One picture may have more, so others wait for no more than one large picture."""

IDLE_PIXELS = 16 * 512 * 512
"""Maximum number of pixels in one decoder call on a GPU that has nothing else to do.

Larger calls take less time per picture, and an idle device has nobody to delay.
"""

IN_FLIGHT = 2
"""Maximum number of decoder calls queued or running on a GPU, which bounds their memory."""

POLL_INTERVAL_S = 0.0005
"""Seconds after which an engine without other work looks again whether pictures are decoded."""

TICKS_OF_BACKLOG = 4
"""Number of ticks within which a CPU decodes a backlog, however many images finish at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """A decoder call in flight: its images, their pixels, and whether each picture is finite."""

    sequences: list[Sequence]
    pixels_and_finite: HostCopy
    watch: Stopwatch


class Decoder:
    """Decodes finished images in the order in which they finished, frames of live streams first.

    On CUDA the decoder has a stream of its own, so it runs concurrently with the ticks, and
    ordinary images have a share of its calls (:class:`DecoderQueue`). On a CPU it can only take
    turns with the ticks. Between two ticks it decodes all live frames, one after another, since a
    client waits for each of them. Then it decodes some ordinary pictures: one, or more if over
    ``TICKS_OF_BACKLOG`` wait, but only one if pictures are large. A picture of a client or size
    that has had more than its turn (:class:`~server.engine.fair_queue.Turns`) waits until it is
    due, so that large pictures do not come between the ticks of a small one.

    Args:
        device: device of all models.
        turns: service received by the clients of ordinary images, to which decoding is charged.
        fixed: whether to decode the same number of pictures in every call, so that a picture's bits
            do not depend on how many finished with it.
        free_unused_memory: function that frees memory which is not needed, and returns whether
            there was any.
        decoder_of: function that returns the function that decodes latents of a model, by its tiny
            autoencoder or its own; it replaces ``HostedModel.decode``.
        interrupted: function that waits for other work, at most a number of seconds, and returns
            whether there is any.

    Attributes:
        seconds: device time spent in decoding.
        live_s: part of it that was spent on frames of live streams.
    """

    def __init__(
        self,
        device: torch.device,
        turns: Turns,
        free_unused_memory: Callable[[], bool],
        decoder_of: Callable[[HostedModel, bool], Callable[[Tensor], Tensor]],
        interrupted: Callable[[float], bool],
        *,
        fixed: bool,
    ) -> None:
        self.seconds = 0.0
        self.live_s = 0.0
        self._device = device
        self._free_unused_memory = free_unused_memory
        self._decoder_of = decoder_of
        self._interrupted = interrupted
        self._fixed = fixed
        self._turns = turns
        self._queue = DecoderQueue(turns)
        self._in_flight: deque[Decoding] = deque()
        self._undecoded: list[Sequence] = []
        self._failed: list[tuple[Sequence, Exception]] = []

    def add(self, done: list[Sequence]) -> None:
        """Take images whose slot 0 is the clean latent; some want that latent, not pixels."""
        for sequence in done:
            if sequence.task.undecoded:
                self._undecoded.append(sequence)
            else:
                self._queue.add(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """Drop a cancelled image; return False if it is already being decoded."""
        return self._queue.drop(sequence)

    def work(self, *, idle: bool) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
        """Start as many decoder calls as there is room for, and yield finished images.

        Args:
            idle: whether there is nothing else to do, so that it waits for pictures before it
                returns.

        Yields:
            Each image with its result, or with its own error.

        Raises:
            DeviceLost: the device no longer answers.
        """
        latents, self._undecoded = self._undecoded, []
        for sequence in latents:
            yield sequence, attempt(lambda one=sequence: undecoded(one), self._device)
        if self._device.type != "cuda":
            yield from self._between_ticks(idle=idle)
            return
        while self._queue and len(self._in_flight) < IN_FLIGHT:
            if self._queue.live_turn():
                some = self._queue.take_live(self._max_images(self._queue.live[0], idle=idle))
            else:
                some = self._queue.take_ordinary(lambda one: self._max_images(one, idle=idle))
            self._start(some)
        yield from self._finished(idle=idle)

    def finished(self) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
        """Yield images that are finished by now, as :meth:`work` does, and start nothing.

        Raises:
            DeviceLost: the device no longer answers.
        """
        yield from self._finished(idle=False)

    def _between_ticks(self, *, idle: bool) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
        """On a CPU: decode all live frames, and some ordinary images, flow by flow."""
        while self._queue.live:
            self._start(self._queue.take_live(DECODER_BATCH if self._fixed else 1))
            yield from self._finished(idle=False)
        pictures = -(-self._queue.ordinary // TICKS_OF_BACKLOG)
        pixels = MAX_DECODER_PIXELS
        while pictures > 0 and pixels > 0:
            some = self._queue.take_ordinary(partial(self._due, pictures, pixels, idle))
            if not some:
                return
            self._start(some)
            yield from self._finished(idle=False)
            pictures -= len(some)
            pixels -= len(some) * _pixels(some[0])

    def _due(self, pictures: int, pixels: int, idle: bool, first: Sequence) -> int:
        """Number of images of a flow that may be decoded between two ticks, given the first one."""
        if not (idle or self._turns.flow_due(first.flow, MAX_LEAD_S)):
            return 0
        if self._fixed:
            return DECODER_BATCH
        return max(1, min(pictures, pixels // _pixels(first)))

    def _finished(self, *, idle: bool) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
        while self._in_flight and self._is_there(self._in_flight[0], idle=idle):
            yield from self._results(self._in_flight.popleft())
            idle = False
        failed, self._failed = self._failed, []
        yield from failed

    def _is_there(self, decoding: Decoding, *, idle: bool) -> bool:
        """Whether a call has finished, or finishes before the engine has other work to do."""
        copy = decoding.pixels_and_finite
        while attempt(lambda: copy.ready, self._device) is False:
            if not idle or self._interrupted(POLL_INTERVAL_S):
                return False
        # An error of the call is raised again when its pixels are fetched, and ends its images.
        return True

    def _max_images(self, first: Sequence, *, idle: bool) -> int:
        """Number of images that the next decoder call on a GPU may take, given the first one."""
        if self._fixed:
            return DECODER_BATCH
        if idle:
            return max(DECODER_BATCH, IDLE_PIXELS // _pixels(first))
        return max(1, min(DECODER_BATCH, MAX_DECODER_PIXELS // _pixels(first)))

    def _start(self, some: list[Sequence], *, retried: bool = False) -> None:
        """Decode some images in one call, or one by one if that call fails.

        Without room it is tried again once the calls in flight have ended, unless it was.
        """
        made = attempt(lambda: self._decoding(some), self._device)
        if isinstance(made, Decoding):
            self._in_flight.append(made)
            return
        if is_out_of_memory(made):
            beside_others = bool(self._in_flight) and not retried
            self._settle()
            if self._free_unused_memory() or beside_others:
                self._start(some, retried=True)
                return
        if len(some) == 1:
            log.error("an image failed in decoding", exc_info=made)
            self._failed.append((some[0], made))
            return
        for one in some:
            self._start([one])

    def _settle(self) -> None:
        """Wait for all decoder calls in flight, whose memory is free afterwards.

        Errors of theirs are raised again when their results are made.
        """
        for decoding in self._in_flight:
            attempt(decoding.pixels_and_finite.fetch, self._device)

    def _decoding(self, some: list[Sequence]) -> Decoding:
        latents = self._latents(some)
        watch = Stopwatch(self._device)
        decode = self._decoder_of(some[0].lane.model, some[0].task.tiny)
        with on_decoder_stream(self._device):
            if latents.is_cuda:
                # Else the allocator would give their memory to the next tick while they are read.
                latents.record_stream(torch.cuda.current_stream(self._device))
            # Before the decoder, for whose end a copy from the host would wait, and so would ticks.
            kept = [_kept(sequence, latents) for sequence in some]
            with watch:
                pictures = decode(latents)[: len(some)]
            for i, of_user in enumerate(kept):
                if of_user is not None:
                    # Pixels that the user asked to keep are copied, not reconstructed by the
                    # autoencoder.
                    pixels, mask = of_user
                    pictures[i] = torch.lerp(pixels, pictures[i], mask)
            finite = pictures.flatten(1).sum(1).isfinite()
            # Outside the stopwatch, whose events have completed once the copy has arrived.
            copy = HostCopy(to_uint8(pictures), finite)
        return Decoding(some, copy, watch)

    def _latents(self, some: list[Sequence]) -> Tensor:
        lane = some[0].lane
        slots = [sequence.slot for sequence in some]
        filler = [slots[0]] * (DECODER_BATCH - len(slots)) if self._fixed else []
        return lane.pool.columns[:, 0].index_select(0, lane.indices(slots + filler))

    def _results(self, decoding: Decoding) -> Iterator[tuple[Sequence, ImageResult | Exception]]:
        fetched = attempt(decoding.pixels_and_finite.fetch, self._device)
        if isinstance(fetched, Exception):
            log.error("images failed in decoding", exc_info=fetched)
            yield from ((sequence, fetched) for sequence in decoding.sequences)
            return
        seconds = decoding.watch.seconds()
        self.seconds += seconds
        if decoding.sequences[0].live:
            self.live_s += seconds
        else:
            self._turns.charge(decoding.sequences[0].flow, seconds)
        pixels, finite = fetched
        rows = zip(decoding.sequences, finite.tolist(), pixels.numpy(), strict=True)
        for sequence, sound, picture in rows:
            if not sound:
                broken = RowFailed("The image became NaN or infinite while it was decoded.")
                yield sequence, broken
                continue
            # A copy: pinned memory is scarce, and a view would keep the whole batch alive. Without
            # room for it the image fails, since this may run within the stage of others.
            yield sequence, attempt(partial(_delivered, sequence, picture), self._device)


def _delivered(sequence: Sequence, picture: NDArray[np.uint8]) -> ImageResult:
    return sequence.result(picture.copy())


def _kept(sequence: Sequence, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pixels ``[3, H, W]`` that an inpainted image keeps, and its mask; else None."""
    task = sequence.task
    pixels = task.image if task.kept is None else task.kept
    if pixels is None or task.mask is None:
        return None
    return pixels.to(like), task.mask.to(like)


def _pixels(sequence: Sequence) -> int:
    return sequence.task.width * sequence.task.height

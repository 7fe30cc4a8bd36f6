"""A frame of a live stream, from its arrival to its output, and the listener for its progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.errors import RowFailed, WeftError

if TYPE_CHECKING:
    import numpy as np

    from server.engine.state.sequence import ImageResult
    from server.engine.state.submission import Submission
    from server.image_codec import OutputFormat

__all__ = ["FailedFrame", "Frame", "FrameListener", "InputFrame", "OutputFrame"]


@dataclass(frozen=True, slots=True)
class InputFrame:
    """A file that a client sent.

    Attributes:
        number: number of the frame, counted from 0.
        data: content of the file.
        arrived: time of its arrival.
    """

    number: int
    data: bytes
    arrived: float


@dataclass(frozen=True, slots=True)
class OutputFrame:
    """An image for the client.

    Attributes:
        number: number of the frame, counted from 0.
        source: number of the input frame; None if it was made from the prompt alone.
        seed: seed that it was made with.
        skipped: whether it repeats the image before it.
        dropped: number of input frames that were dropped so far.
        data: content of the image file.
        output_format: format of that file.
        queue_s: seconds from the input's arrival to the first evaluation.
        denoise_s: seconds from the first evaluation to the clean latent.
        decode_s: seconds from the clean latent to the pixels.
        total_s: seconds from the input's arrival to the encoded file.
    """

    number: int
    source: int | None
    seed: int
    skipped: bool
    dropped: int
    data: bytes
    output_format: OutputFormat
    queue_s: float
    denoise_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class FailedFrame:
    """An input frame without an output.

    Attributes:
        error: error that says why.
        number: number of the output frame that is missing; None if it had none yet.
        source: number of the input frame; None if there is none.
    """

    error: WeftError
    number: int | None
    source: int | None


@dataclass(slots=True, eq=False)
class Frame:
    """A frame under way.

    Attributes:
        number: number of the output frame; None until it is certain that there is one.
        source: number of the input frame; None if there is none.
        seed: seed of its noise.
        arrived: time at which the input arrived.
        output_format: format of its output.
        submitted: time at which it was submitted to the engine.
        started: whether its first evaluation has begun, or it ended before that.
        denoised: whether its last evaluation is done or under way, so that only decoding is left.
        skipped: whether the similarity filter skipped it.
        result: result of the engine.
        error: why there is no result.
        submission: its submission to the engine.
    """

    source: int | None
    seed: int
    arrived: float
    output_format: OutputFormat
    number: int | None = None
    submitted: float = 0.0
    started: bool = False
    denoised: bool = False
    skipped: bool = False
    result: ImageResult | None = None
    error: WeftError | None = None
    submission: Submission | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        """Whether the frame has ended, with or without a result."""
        return self.skipped or self.result is not None or self.error is not None


class FrameListener:
    """Transfers what the engine reports about a frame from its thread to the event loop.

    Args:
        frame: frame that is reported on.
        loop: event loop.
        changed: function that is called in the event loop after each report.
    """

    def __init__(
        self, frame: Frame, loop: asyncio.AbstractEventLoop, changed: Callable[[], None]
    ) -> None:
        self._frame = frame
        self._loop = loop
        self._changed = changed

    def started(self, index: int) -> None:
        """The frame left the queue (called in the engine's thread)."""
        self._call_soon(self._start)

    def progress(self, index: int, step: int, steps: int, preview: np.ndarray | None) -> None:
        """A step is done, or the last one is under way (called in the engine's thread)."""
        if step == steps:
            self._call_soon(self._denoise)

    def finished(self, index: int, result: ImageResult) -> None:
        """The frame is finished (called in the engine's thread)."""
        self._call_soon(lambda: self._finish(result))

    def failed(self, index: int, error: Exception) -> None:
        """The frame failed (called in the engine's thread)."""
        if not isinstance(error, WeftError):
            error = RowFailed("The frame failed; the server's log has the details.")
        self._call_soon(lambda known=error: self._fail(known))

    def _call_soon(self, call: Callable[[], None]) -> None:
        # A closed loop has no reader left; its error must not reach the engine's thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _start(self) -> None:
        self._frame.started = True
        self._changed()

    def _denoise(self) -> None:
        self._frame.denoised = True
        self._changed()

    def _finish(self, result: ImageResult) -> None:
        self._frame.result = result
        self._changed()

    def _fail(self, error: WeftError) -> None:
        self._frame.started = True
        self._frame.error = error
        self._changed()

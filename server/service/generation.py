"""A running request: transfers what the engine reports from its thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from server.engine.state.sequence import ImageResult
from server.errors import (
    Cancelled,
    InvalidRequest,
    NotReady,
    Overloaded,
    RowFailed,
    UnknownModel,
    WeftError,
)
from server.requests.schema import ResolvedRequest
from server.service.waiting_line import WaitingLine

__all__ = ["Generation", "Progress", "outcome_of"]

Result = TypeVar("Result")

log = logging.getLogger("weft")


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one image.

    Attributes:
        index: index of the image within its request.
        step: number of steps completed.
        steps: total number of steps.
        preview: uint8 `[h, w, 3]` if previews were requested.
    """

    index: int
    step: int
    steps: int
    preview: np.ndarray | None


class Cancellable(Protocol):
    """A request's images in the engine."""

    def cancel(self) -> bool:
        """End those that still wait or run; return whether there may have been any."""
        ...


class Generation:
    """An admitted request, and the listener that the engine's thread reports to.

    Everything but the listener's four methods belongs to the event loop. Only the latest unread
    progress of each image is kept, so a slow reader costs no memory.

    Args:
        identifier: identifier, unique among running generations.
        loop: event loop of the reader.
        line: line in which it waits until the first of its images begins.
    """

    def __init__(self, identifier: str, loop: asyncio.AbstractEventLoop, line: WaitingLine) -> None:
        self.id = identifier
        self.created = time.time()
        self.results: dict[int, ImageResult] = {}
        self.outcome = "disconnected"
        self.request: ResolvedRequest
        self.model_revision = ""
        self.statistics: str | None = None
        self.warnings: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.begun_at: float | None = None
        self._created_at = time.monotonic()
        self._loop = loop
        self._line = line
        self._ticket = line.join()
        self._news: dict[int, Progress] = {}
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._submission: Cancellable | None = None
        self._closed = False
        self._ended = False

    def begin(
        self,
        request: ResolvedRequest,
        model_revision: str,
        statistics: str | None,
        warnings: tuple[str, ...],
        notes: tuple[str, ...],
        submission: Cancellable,
    ) -> None:
        """Record what was submitted; a generation closed in the meantime is cancelled at once.

        Args:
            request: request with every default filled in.
            model_revision: revision of the model that serves it.
            statistics: guidance of the model statistics that the sampler is planned with, if any.
            warnings: one sentence for each setting that has no effect or does not suit the model.
            notes: one sentence about the settings that a distilled model's convention chose.
            submission: images of the request in the engine.
        """
        self.request, self.model_revision, self.statistics = request, model_revision, statistics
        self.warnings, self.notes = warnings, notes
        self._submission = submission
        if self._closed:
            submission.cancel()

    @property
    def done(self) -> bool:
        """Whether every image is finished."""
        return self._submission is not None and len(self.results) == self.request.n

    @property
    def queue_position(self) -> int | None:
        """Number of earlier requests that have not begun either; None once it has begun."""
        return self._line.position(self._ticket)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._created_at

    async def news(self, within_s: float | None = None) -> list[Progress]:
        """Return progress since the last call; wait for some, at most `within_s`.

        Returns:
            The latest progress of each image that advanced; nothing if time ran out or all ended.

        Raises:
            WeftError: an image failed, or the generation was cancelled.
        """
        if not self.done and self._error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._wake.wait()
        self._wake.clear()
        self.check()
        news, self._news = list(self._news.values()), {}
        return news

    async def begun(self, within_s: float) -> None:
        """Wait at most `within_s` until the first of its images begins; does not consume progress.

        Raises:
            WeftError: an image failed, or the generation was cancelled.
        """
        if self.queue_position is not None and self._error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._wake.wait()
            if not self._news:
                self._wake.clear()
        self.check()

    async def unless_ended(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of some work before the start; cancel it if the generation ends first.

        Raises:
            WeftError: the generation was cancelled or abandoned.
        """
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.check()
            return await working
        finally:
            ending.cancel()
            working.cancel()

    def complete(self) -> None:
        """Record that its images are ready; from here on it cannot be cancelled.

        Raises:
            WeftError: an image failed, or the generation was cancelled first.
        """
        self.check()
        self.end()

    def check(self) -> None:
        """Raise the error that the generation failed with, if any.

        Raises:
            WeftError: an image failed, or the generation was cancelled.
        """
        if self._error is not None:
            raise self._error

    def end(self, error: BaseException | None = None) -> None:
        """Record the end, with images or with an error; only the first call counts."""
        if not self._ended:
            self._ended = True
            self.outcome = "completed" if error is None else outcome_of(error)

    def cancel(self) -> bool:
        """Stop the work, unless it has ended; readers get :class:`Cancelled`.

        Returns:
            Whether the generation is cancelled. If so its images are never returned; if not, it
            had already completed or failed.
        """
        self._fail(Cancelled())
        return isinstance(self._error, Cancelled)

    def abandon(self, error: WeftError) -> None:
        """Stop the work, unless all images are finished; readers get `error`."""
        if not self.done:
            self._fail(error)

    def close(self) -> None:
        """Stop reading; unfinished work ends at the next tick."""
        self._closed = True
        self._line.leave(self._ticket)
        if self._submission is not None and not self.done:
            self._submission.cancel()

    def started(self, index: int) -> None:
        """An image left the queue (called in the engine's thread)."""
        self._call_soon(self._begun)

    def progress(self, index: int, step: int, steps: int, preview: np.ndarray | None) -> None:
        """An image completed a step (called in the engine's thread)."""
        self._call_soon(self._moved, Progress(index, step, steps, preview))

    def finished(self, index: int, result: ImageResult) -> None:
        """An image is finished (called in the engine's thread)."""
        self._call_soon(self._finish, index, result)

    def failed(self, index: int, error: Exception) -> None:
        """An image failed (called in the engine's thread)."""
        if not isinstance(error, WeftError):
            log.error("image %d of %s failed", index, self.id, exc_info=error)
            error = RowFailed(f"Image {index} failed; the server's log has the details.")
        self._call_soon(self._fail, error)

    def _call_soon(self, call: Callable[..., None], *arguments: Any) -> None:
        # A closed loop has no reader left; its error must not reach the engine's thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def _begun(self) -> None:
        if self.begun_at is None:
            self.begun_at = time.monotonic()
            self._line.leave(self._ticket)
            self._wake.set()

    def _moved(self, progress: Progress) -> None:
        self._news[progress.index] = progress
        self._wake.set()

    def _finish(self, index: int, result: ImageResult) -> None:
        self.results[index] = result
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        if not self._ended:
            self._error = error
            self.end(error)
            self.close()
        self._wake.set()


def outcome_of(error: BaseException) -> str:
    """The outcome under which the metrics count an error."""
    match error:
        case Cancelled():
            return "cancelled"
        case asyncio.CancelledError():
            return "disconnected"
        case Overloaded():
            return "overloaded"
        case NotReady():
            return "unavailable"
        case InvalidRequest() | UnknownModel():
            return "invalid"
        case _:
            return "failed"

"""Second runs that draw the images of a request again, larger, each after its first run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from server.engine.reservation import Reservation
from server.engine.state.sequence import ImageResult
from server.engine.state.submission import Submission
from server.engine.task import ImageTask
from server.requests.second_run import naming_hires
from server.service.generation import Generation

__all__ = ["SecondRun", "Started"]

Started: TypeAlias = Callable[[ImageTask, ImageResult], ImageTask]
"""Function that makes a task of the second run start from the result of the first."""


class SecondRun:
    """Listens to the first run on behalf of the generation, and submits the second of each image.

    To the generation both are one run, which it cancels as one submission.

    Args:
        generation: generation of the images.
        loop: its event loop, in whose threads images are enlarged.
        room: room reserved for both runs of all images; it is returned when they are cancelled.
        first: a task of the first run.
        tasks: tasks of the second run, without what they start from.
        started_from: function that makes one of these start from the result of its first run.
    """

    def __init__(
        self,
        generation: Generation,
        loop: asyncio.AbstractEventLoop,
        room: Reservation,
        first: ImageTask,
        tasks: Sequence[ImageTask],
        started_from: Started,
    ) -> None:
        self._generation = generation
        self._loop = loop
        self._room = room
        self._tasks = tasks
        self._started_from: Final = started_from
        self._first_steps: Final = first.plan.steps
        self._steps: Final = first.plan.steps + tasks[0].plan.steps
        self._submissions: list[Submission] = []
        self._cancelled = False
        self._lock = Lock()

    def submit(self, first: Sequence[ImageTask]) -> None:
        """Submit the first run.

        Raises:
            WeftError: see :meth:`Reservation.submit`.
        """
        submission = self._room.submit(first, self)
        with self._lock:
            self._submissions.append(submission)

    def cancel(self) -> bool:
        """End all images that wait or run; return whether there may have been any."""
        with self._lock:
            self._cancelled = True
            submissions = list(self._submissions)
        self._room.release()
        ended = [submission.cancel() for submission in submissions]
        return any(ended)

    def started(self, index: int) -> None:
        """An image left the queue."""
        self._generation.started(index)

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        """A step of the first run is done."""
        self._generation.progress(index, step, self._steps, preview)

    def finished(self, index: int, result: ImageResult) -> None:
        """The first run of an image has ended."""
        # A closed loop has no reader left. Enlarging takes too long for the engine's thread.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(
                self._loop.run_in_executor, None, self._again, index, result
            )

    def failed(self, index: int, error: Exception) -> None:
        """An image failed in its first run."""
        self._generation.failed(index, error)

    def _again(self, index: int, first: ImageResult) -> None:
        listener = _Second(self._generation, index, first, self._first_steps, self._steps)
        try:
            own = self._started_from(self._tasks[index], first)
            with self._lock, naming_hires():
                if not self._cancelled:
                    self._submissions.append(self._room.submit([own], listener))
        except Exception as error:  # noqa: BLE001 - the generation reports it
            self._generation.failed(index, error)


class _Second:
    """Listens to the second run of one image.

    Args:
        generation: generation of the image.
        index: index of the image.
        first: result of its first run.
        first_steps: number of steps of the first run.
        steps: number of steps of both runs.
    """

    def __init__(
        self,
        generation: Generation,
        index: int,
        first: ImageResult,
        first_steps: int,
        steps: int,
    ) -> None:
        self._generation = generation
        self._index = index
        self._first = first
        self._first_steps = first_steps
        self._steps = steps

    def started(self, index: int) -> None:
        """The second run begins."""

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        """A step of the second run is done."""
        self._generation.progress(self._index, self._first_steps + step, self._steps, preview)

    def finished(self, index: int, result: ImageResult) -> None:
        """Report the finished image, with the cost of both runs."""
        first = self._first
        both = replace(
            result,
            evaluations=first.evaluations + result.evaluations,
            saved=first.saved + result.saved,
            queue_s=first.queue_s,
            denoise_s=first.denoise_s + first.decode_s + result.queue_s + result.denoise_s,
            ancestor=self._index,
        )
        self._generation.finished(self._index, both)

    def failed(self, index: int, error: Exception) -> None:
        """The image failed in its second run."""
        self._generation.failed(self._index, error)

"""Requests of AUTOMATIC1111's clients that are under way, for their progress and interruption.

Its server runs one job at a time, and its clients ask how "the" job is doing. Here each client has
its own: those of its key and address, of which the oldest is the one that is spoken of.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import numpy as np
from fastapi import Depends, Request

from server.errors import UnknownGeneration
from server.service.generation import Generation, Progress
from server.service.service import Service

__all__ = ["ClientJob", "ClientJobs", "JobsDep", "Owner", "owner_of"]

Owner: TypeAlias = "tuple[bytes, str]"
"""Digest of a client's key, and its address."""


def owner_of(request: Request) -> Owner:
    """Whom a request comes from."""
    key = request.scope["state"].get("api_key")
    return b"" if key is None else key.digest, "" if request.client is None else request.client.host


@dataclass(slots=True, eq=False)
class ClientJob:
    """A request under way.

    Attributes:
        owner: who sent it.
        images: that it asks for.
        steps: of each, as far as is known.
        generation: that makes them, once it is admitted.
        progress: the latest of each image that has begun.
        interrupted: whether its client had enough of it.
    """

    owner: Owner
    images: int
    steps: int
    generation: Generation | None = None
    progress: dict[int, Progress] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def seen(self) -> tuple[Progress, ...]:
        """The progress of each image that has begun, as it is now; from any thread."""
        return tuple(self.progress.values())

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1."""
        done = sum(one.step / one.steps for one in self.seen if one.steps)
        return min(1.0, done / self.images)

    @property
    def queue_position(self) -> int | None:
        """How many requests are before it that have not begun; None if it has begun itself."""
        return None if self.generation is None else self.generation.queue_position

    @property
    def left_s(self) -> float:
        """Seconds until it ends, if it goes on as it began; 0 while nothing is known of that."""
        share, generation = self.share, self.generation
        if generation is None or generation.begun_at is None or not share:
            return 0.0
        return (time.monotonic() - generation.begun_at) * (1 - share) / share

    @property
    def preview(self) -> np.ndarray | None:
        """Of the first image that is not finished, uint8 `[h, w, 3]`; None before the first."""
        shown = [one for one in self.seen if one.preview is not None]
        unfinished = [one for one in shown if one.step < one.steps] or shown
        return min(unfinished, key=lambda one: one.index).preview if unfinished else None

    async def follow(self, generation: Generation) -> None:
        """Take in the progress of a generation until all images are finished.

        Raises:
            WeftError: an image failed, or the job was interrupted.
        """
        self.generation = generation
        while not generation.done:
            for progress in await generation.news():
                self.progress[progress.index] = progress
                self.steps = progress.steps


class ClientJobs:
    """All of them, in the order in which they came.

    Args:
        service: that makes the images.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        # Not by their identifiers: clients choose these, and may send one twice.
        self._jobs: dict[ClientJob, str] = {}

    @contextmanager
    def added(self, identifier: str, job: ClientJob) -> Generator[None]:
        """Know of a job for the time of the `with` block."""
        self._jobs[job] = identifier
        try:
            yield
        finally:
            del self._jobs[job]

    def of(self, owner: Owner) -> list[ClientJob]:
        """The jobs of a client, the oldest first."""
        return [job for job in self._jobs if job.owner == owner]

    def interrupt(self, owner: Owner) -> None:
        """End the oldest job of a client, which is answered with what there is of it."""
        for job, identifier in self._jobs.items():
            if job.owner == owner and not job.interrupted:
                job.interrupted = True
                # It may have ended just now.
                with suppress(UnknownGeneration):
                    self._service.cancel(identifier)
                return


async def _jobs(request: Request) -> ClientJobs:
    return request.app.state.automatic1111_jobs


JobsDep = Annotated[ClientJobs, Depends(_jobs)]

"""Running requests of AUTOMATIC1111's clients, for progress and interruption.

AUTOMATIC1111's server runs one job at a time, and its clients ask for the progress of "the" job.
Here each client, identified by its key and address, has its own jobs, and such routes refer to the
oldest of these.
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
    """Return the client that sent a request."""
    key = request.scope["state"].get("api_key")
    return b"" if key is None else key.digest, "" if request.client is None else request.client.host


@dataclass(slots=True, eq=False)
class ClientJob:
    """A running request.

    Attributes:
        owner: client that sent it.
        images: number of images that it asks for.
        steps: steps of each image, as far as is known.
        generation: generation that makes the images, once it is admitted.
        progress: latest progress of each image that has begun.
        interrupted: whether its client interrupted it.
    """

    owner: Owner
    images: int
    steps: int
    generation: Generation | None = None
    progress: dict[int, Progress] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def seen(self) -> tuple[Progress, ...]:
        """Current progress of each image that has begun; may be read from any thread."""
        return tuple(self.progress.values())

    @property
    def share(self) -> float:
        """Share of the work that is done, from 0 to 1."""
        done = sum(one.step / one.steps for one in self.seen if one.steps)
        return min(1.0, done / self.images)

    @property
    def queue_position(self) -> int | None:
        """Number of earlier requests that have not begun; None if it has begun itself."""
        return None if self.generation is None else self.generation.queue_position

    @property
    def left_s(self) -> float:
        """Estimated seconds until it ends, at the pace so far; 0 while unknown."""
        share, generation = self.share, self.generation
        if generation is None or generation.begun_at is None or not share:
            return 0.0
        return (time.monotonic() - generation.begun_at) * (1 - share) / share

    @property
    def preview(self) -> np.ndarray | None:
        """Preview of the first unfinished image, uint8 `[h, w, 3]`; None if there is none yet."""
        shown = [one for one in self.seen if one.preview is not None]
        unfinished = [one for one in shown if one.step < one.steps] or shown
        return min(unfinished, key=lambda one: one.index).preview if unfinished else None

    async def follow(self, generation: Generation) -> None:
        """Record the progress of a generation until all images are finished.

        Raises:
            WeftError: an image failed, or the job was interrupted.
        """
        self.generation = generation
        while not generation.done:
            for progress in await generation.news():
                self.progress[progress.index] = progress
                self.steps = progress.steps


class ClientJobs:
    """All running requests of AUTOMATIC1111's clients, in the order of arrival.

    Args:
        service: service that makes the images.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        # Not keyed by identifier, which clients choose and may use twice.
        self._jobs: dict[ClientJob, str] = {}

    @contextmanager
    def added(self, identifier: str, job: ClientJob) -> Generator[None]:
        """Register a job for the duration of the `with` block."""
        self._jobs[job] = identifier
        try:
            yield
        finally:
            del self._jobs[job]

    def of(self, owner: Owner) -> list[ClientJob]:
        """Return the jobs of a client, the oldest first."""
        return [job for job in self._jobs if job.owner == owner]

    def interrupt(self, owner: Owner) -> None:
        """Interrupt the oldest running job of a client; its response has the images so far."""
        for job, identifier in self._jobs.items():
            if job.owner == owner and not job.interrupted:
                job.interrupted = True
                # The generation may have just ended.
                with suppress(UnknownGeneration):
                    self._service.cancel(identifier)
                return


async def _jobs(request: Request) -> ClientJobs:
    return request.app.state.automatic1111_jobs


JobsDep = Annotated[ClientJobs, Depends(_jobs)]

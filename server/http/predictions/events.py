"""Server-sent events of a durable job, which continues without readers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel

from server.errors import JobsUnavailable
from server.http.native.events import PING_S
from server.http.predictions.answers import Step, predicted
from server.jobs.job import Job
from server.jobs.jobs import LOOK_S, Jobs

__all__ = ["PredictionStream"]

HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class PredictionStream(EventSourceResponse):
    """The event stream of a job: its status, at once and at each change, and its progress.

    Args:
        jobs: jobs of the server.
        job: current state of the job.
    """

    def __init__(self, jobs: Jobs, job: Job) -> None:
        super().__init__(_events(jobs, job), headers=HEADERS)


async def _events(jobs: Jobs, job: Job) -> AsyncIterator[bytes]:
    shown: tuple[str, int | None] | None = None
    spoke = time.monotonic()
    with jobs.watches.on(job.id) as watch:
        while True:
            position = (await jobs.positions([job])).get(job.id)
            if shown != (job.status, position):
                shown = job.status, position
                spoke = time.monotonic()
                yield _event("status", predicted(job, position))
            if job.ended or jobs.leaving.is_set():
                return
            for progress in await watch.news(LOOK_S):
                spoke = time.monotonic()
                step = Step(index=progress.index, step=progress.step, steps=progress.steps)
                yield _event("progress", step)
            if time.monotonic() - spoke > PING_S:
                spoke = time.monotonic()
                yield KEEPALIVE_COMMENT
            with suppress(JobsUnavailable):
                job = await jobs.get(job.owner, job.id)


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json())

"""Takes jobs from the database, runs them, and stores their results."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from server.blobs import Blobs
from server.engine.client import Client
from server.errors import (
    Cancelled,
    DidNotFit,
    JobsUnavailable,
    NotReady,
    OutOfMemory,
    Overloaded,
    UnknownGeneration,
    WeftError,
)
from server.jobs import store
from server.jobs.database import Database
from server.jobs.job import Job
from server.jobs.watching import Watches
from server.requests.messages import explain
from server.requests.schema import GenerateRequest
from server.requests.upload import put_upload
from server.service.pictures import Pictures
from server.service.service import Service
from server.settings import JobSettings

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Runner", "output_name", "upload_name"]

log = logging.getLogger("weft")

LEASE_S: Final = 45.0
RENEW_S: Final = 10.0
LOOK_S: Final = 1.0
"""Seconds between looks for jobs that other servers accepted, or that are due for a retry."""

LONGEST_WAIT_S: Final = 10.0
"""Maximum seconds until a job that found the queue full is tried again; there may be room sooner
than estimated."""

KEY_REMOVED: Final = {
    "message": "The API key of this request is no longer accepted.",
    "code": "key_removed",
    "param": None,
}

IDENTIFIER: Final = re.compile("[0-9a-f]{32}")
"""Form of a job's identifier, which is also the name of the folder with its pictures."""

SWEEP_S: Final = 30.0
SWEPT_AT_ONCE: Final = 100


def upload_name(identifier: str, field: str) -> str:
    """Name of the file with a picture that was sent with a job."""
    return f"{identifier}/{field}"


def output_name(identifier: str, attempt: int, index: int) -> str:
    """Name of the file with a picture that an attempt made."""
    return f"{identifier}/{attempt}/{index}"


class Runner:
    """Runs jobs in the engine of this process.

    Args:
        service: service that makes pictures.
        database: database with the jobs.
        blobs: storage of their pictures.
        watches: watchers to notify of progress and changes.
        settings: number of jobs at once, number of attempts, and time for which jobs are kept.
        clients: client of each owner, whose share of the device the owner's jobs use; jobs of other
            owners are not begun.
    """

    def __init__(
        self,
        service: Service,
        database: Database,
        blobs: Blobs,
        watches: Watches,
        settings: JobSettings,
        clients: Mapping[str, Client],
    ) -> None:
        self._service = service
        self._database = database
        self._blobs = blobs
        self._watches = watches
        self._settings = settings
        self._clients = clients
        self._worker = uuid.uuid4().hex
        self._wake = asyncio.Event()
        self._under_way: dict[str, tuple[Job, asyncio.Task[None]]] = {}

    def wake(self) -> None:
        """Note that there may be a job to begin."""
        self._wake.set()

    def cancel(self, identifier: str) -> None:
        """Stop the work on a job that was cancelled, if it runs here."""
        if identifier in self._under_way:
            job, _ = self._under_way[identifier]
            # It may be about to begin, or have just ended; then its result is discarded.
            with suppress(UnknownGeneration):
                self._service.cancel(_generation_of(job))

    async def run(self) -> None:
        """Begin jobs while there are any and there is room, until cancelled."""
        while True:
            self._wake.clear()
            while self._service.ready and len(self._under_way) < self._settings.running:
                job = await self._database.run(
                    store.begin,
                    self._worker,
                    LEASE_S,
                    time.time(),
                    list(self._clients),
                    list(self._under_way),
                )
                if job is None:
                    break
                task = asyncio.create_task(self._attempt(job))
                self._under_way[job.id] = job, task
                task.add_done_callback(partial(self._ended, job))
                self._watches.tell(job.id)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def renew(self) -> None:
        """Renew the leases of running jobs, and stop jobs that this server has lost."""
        while True:
            await asyncio.sleep(RENEW_S)
            mine = list(self._under_way)
            kept = await self._database.run(store.renew, self._worker, mine, LEASE_S, time.time())
            for identifier in set(mine) - kept:
                self.cancel(identifier)

    async def sweep(self) -> None:
        """Delete expired jobs, pictures without a job, and jobs without a key."""
        await self._delete_strays()
        while True:
            await self._disown()
            over = await self._database.run(store.expired, time.time(), SWEPT_AT_ONCE)
            # Pictures first: an interrupted deletion is then repeated.
            await self._blobs.delete(over)
            await self._database.run(store.forget, over)
            if len(over) < SWEPT_AT_ONCE:
                await asyncio.sleep(SWEEP_S)

    async def stop(self) -> None:
        """Abandon the running jobs, which wait for the next start."""
        under_way = list(self._under_way.values())
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)
        # Without the database, they are begun again when their leases have ended.
        with suppress(JobsUnavailable):
            for job, _ in under_way:
                await self._database.run(store.requeue, job, 0.0, spare=True)

    async def _delete_strays(self) -> None:
        """Delete pictures that a process stored before it ended, without storing the job."""
        if not self._database.alone:
            # Another server may be about to accept their job.
            return
        # The configured place may contain other files too.
        there = [name for name in await self._blobs.sizes() if IDENTIFIER.fullmatch(name)]
        known = await self._database.run(store.known, there)
        await self._blobs.delete([name for name in there if name not in known])

    async def _disown(self) -> None:
        """End jobs whose key was removed, which would otherwise wait forever."""
        # Another server may know a new key already that this one does not know yet.
        patience_s = 0.0 if self._database.alone else self._settings.keep_s
        now = time.time()
        ended = await self._database.run(
            store.disown,
            list(self._clients),
            now - patience_s,
            KEY_REMOVED,
            self._settings.keep_s,
            now,
        )
        if ended:
            log.warning("jobs of keys that are no longer accepted failed: %s", ", ".join(ended))
            for identifier in ended:
                self._watches.tell(identifier)

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            # Its lease is no longer renewed, so it is begun again after the lease ends.
            log.error("the outcome of job %s was not stored", job.id, exc_info=task.exception())
        del self._under_way[job.id]
        self._watches.tell(job.id)
        self.wake()

    async def _attempt(self, job: Job) -> None:
        """Run a job to its end, or let it wait for another attempt."""
        if job.attempt - job.spared > self._settings.attempts:
            await self._fail(
                job, "interrupted", "The server ended while it ran this job, in every attempt."
            )
            return
        try:
            made = await self._made(job)
        except (Overloaded, DidNotFit) as error:
            await self._wait(job, error.retry_after_s, spare=True)
        except NotReady as error:
            # A job that breaks the device must not do so forever.
            await self._wait(job, error.retry_after_s, spare=self._service.broken is None)
        except Cancelled:
            await self._end(job, "canceled")
        except OutOfMemory as error:
            # Others may have had the memory. Work of this size is refused now, and so waits.
            await self._wait_or_fail(job, 0.0, error)
        except _Unread as error:
            # A store that does not answer may be repaired meanwhile.
            await self._wait_or_fail(job, LONGEST_WAIT_S, error)
        except WeftError as error:
            await self._fail(job, error.code, error.message, error.field)
        except Exception:
            log.exception("job %s failed", job.id)
            sentence = "An unexpected error occurred; the server's log has the details."
            await self._fail(job, WeftError.code, sentence)
        else:
            await self._end_with(job, *made)

    async def _made(self, job: Job) -> tuple[Pictures, str]:
        if not job.input:
            raise WeftError("The stored request is damaged; send it again.")
        fields: dict[str, Any] = deepcopy(dict(job.input))
        for field in job.uploads:
            try:
                picture = await self._blobs.read(upload_name(job.id, field))
            except OSError as error:
                log.error("the pictures of job %s could not be read: %s", job.id, error)
                raise _Unread from None
            put_upload(fields, field, picture.decode())
        try:
            request = GenerateRequest.model_validate(fields)
        except ValidationError as error:
            # It was valid when it was accepted; a plug-in that it names may be gone.
            raise explain(error.errors(), GenerateRequest) from None
        generation = await self._service.admit(
            request, _generation_of(job), self._clients[job.owner]
        )
        try:
            while not generation.done:
                for progress in await generation.news():
                    self._watches.tell(job.id, progress)
            return await self._service.pictures(generation), generation.request.output_format
        finally:
            self._service.release(generation)

    async def _end_with(self, job: Job, pictures: Pictures, output_format: str) -> None:
        try:
            for index, picture in enumerate(pictures.pictures):
                await self._blobs.write(output_name(job.id, job.attempt, index), picture.data)
        except OSError as error:
            # A full disk, or a store that does not answer, may be repaired meanwhile.
            log.error("the images of job %s could not be stored: %s", job.id, error)
            with suppress(OSError):
                await self._blobs.delete([f"{job.id}/{job.attempt}"])
            sentence = "The images could not be stored; the server's log has the details."
            await self._wait_or_fail(job, LONGEST_WAIT_S, WeftError(sentence))
            return
        result = {
            "attempt": job.attempt,
            "output_format": output_format,
            "model": pictures.settings["model"],
            "seeds": [picture.seed for picture in pictures.pictures],
            "settings": pictures.settings,
            "warnings": pictures.warnings,
            "notes": pictures.notes,
            "queue_s": pictures.queue_s,
            "denoise_s": pictures.denoise_s,
            "decode_s": pictures.decode_s,
        }
        if await self._end(job, "succeeded", result=result):
            # Left over from earlier attempts, and the pictures that were sent with the job.
            left = [f"{job.id}/{attempt}" for attempt in range(1, job.attempt)]
            left += [upload_name(job.id, one) for one in job.uploads]
        else:
            left = [f"{job.id}/{job.attempt}"]
        try:
            await self._blobs.delete(left)
        except OSError as error:
            # They are deleted with the job.
            log.error("pictures of job %s could not be deleted: %s", job.id, error)

    async def _end(self, job: Job, status: Any, **outcome: Mapping[str, Any]) -> bool:
        keep_s, now = self._settings.keep_s, time.time()
        return await self._once_stored(
            partial(store.finish, job=job, status=status, keep_s=keep_s, now=now, **outcome)
        )

    async def _once_stored(self, work: Callable[[Connection], bool]) -> bool:
        """Run a transaction on what came of an attempt, as soon as the database can be used.

        Without it, the attempt would be made again, and count as one that was interrupted.
        """
        while True:
            try:
                return await self._database.run(work)
            except JobsUnavailable:
                await asyncio.sleep(LOOK_S)

    async def _fail(self, job: Job, code: str, sentence: str, field: str | None = None) -> None:
        param = None if field is None else f"input.{field}"
        await self._end(job, "failed", error={"message": sentence, "code": code, "param": param})

    async def _wait_or_fail(self, job: Job, wait_s: float, error: WeftError) -> None:
        """Let a job wait after an attempt that counts, or fail it after the last one."""
        if job.attempt - job.spared < self._settings.attempts:
            await self._wait(job, wait_s, spare=False)
        else:
            await self._fail(job, error.code, error.message)

    async def _wait(self, job: Job, wait_s: float, *, spare: bool) -> None:
        again_at = time.time() + min(max(LOOK_S, wait_s), LONGEST_WAIT_S)
        await self._once_stored(partial(store.requeue, job=job, not_before=again_at, spare=spare))


class _Unread(WeftError):
    """The pictures that were sent with a job cannot be read."""

    def __init__(self) -> None:
        super().__init__("Its pictures could not be read; the server's log has the details.")


def _generation_of(job: Job) -> str:
    return f"{job.id}.{job.attempt}"

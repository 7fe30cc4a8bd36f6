"""The entry point to durable jobs: opens their resources, and adds, shows and cancels jobs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError

from server.blobs import Blobs
from server.engine.client import ANONYMOUS
from server.errors import InvalidRequest, JobsUnavailable, NotReady, UnknownJob, WeftError
from server.jobs import store
from server.jobs.database import Database, of_folder, of_url
from server.jobs.deliveries import Deliveries
from server.jobs.job import Job, NewJob, Status
from server.jobs.runner import Runner, output_name, upload_name
from server.jobs.watching import Watches
from server.jobs.webhooks import check_url
from server.latencies import Latencies
from server.service.service import Service
from server.settings import JobSettings, Settings

__all__ = ["Jobs"]

log = logging.getLogger("weft")

LOOK_S: Final = 1.0
"""Seconds between looks at a job that another server may be processing."""

AGAIN_S: Final = 1.0
"""Seconds between attempts while the database fails."""

COUNT_S: Final = 15.0
"""Seconds between counts of the jobs, for the metrics."""

PICTURES_AGAIN_S: Final = 30.0
"""Seconds between attempts to delete pictures while their storage fails."""


class Jobs:
    """Durable jobs, from :meth:`open` to :meth:`close`.

    Args:
        settings: settings of the server.
        service: service that makes pictures.
        describe: function that makes the body of a webhook about a job.

    Attributes:
        watches: watchers of each job.
        leaving: event that is set once the server is about to stop.
        counts: number of stored jobs by status, as last counted; empty until then.
    """

    def __init__(
        self, settings: Settings, service: Service, describe: Callable[[Job], bytes]
    ) -> None:
        self.watches = Watches()
        self.leaving = service.leaving
        self.counts: Mapping[Status, int] = {}
        self._settings: JobSettings = settings.jobs
        keys = {key.digest.hex(): key.client for key in settings.api_keys}
        # Without keys, all jobs have one owner.
        self._clients = keys or {"": ANONYMOUS}
        self._service = service
        self._describe = describe
        self._database: Database
        self._blobs: Blobs
        self._runner: Runner
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Open the database, migrate it, and begin to run its jobs.

        Raises:
            NotReady: another server uses the folder, or the database or the storage of the pictures
                cannot be used.
        """
        settings = self._settings
        try:
            self._blobs = await asyncio.to_thread(Blobs, settings.place_of_pictures)
            self._database = await asyncio.to_thread(_database, settings)
        except (OSError, ImportError, ValueError, SQLAlchemyError) as error:
            raise NotReady(str(getattr(error, "orig", error)).partition("\n")[0]) from error
        if self._database.alone:
            await self._database.run(store.free_all)
        self._runner = Runner(
            self._service, self._database, self._blobs, self.watches, settings, self._clients
        )
        work = [self._runner.run, self._runner.renew, self._runner.sweep, self._count]
        if settings.webhook_secret is not None:
            deliveries = Deliveries(
                self._database,
                settings.webhook_secret.get_secret_value(),
                self._describe,
                private=settings.webhook_private,
            )
            work.append(deliveries.run)
        self._tasks = [asyncio.create_task(_for_ever(one)) for one in work]

    @property
    def reachable(self) -> bool:
        """Whether the database answered the last time; the runner tries it every second or so."""
        return self._database.reachable

    @property
    def transaction_seconds(self) -> Latencies:
        """Times of the database's transactions."""
        return self._database.seconds

    async def close(self) -> None:
        """Stop; running jobs wait for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.stop()
        await asyncio.to_thread(self._database.close)

    def check_webhook(self, url: str | None) -> None:
        """Refuse a webhook that could not be sent.

        Raises:
            InvalidRequest: it is not a URL, is a private one, or this server sends no webhooks.
        """
        if url is None:
            return
        if self._settings.webhook_secret is None:
            raise InvalidRequest(
                "webhook",
                "webhook is given, but this server sends none; the operator can set "
                "WEFT_JOBS__WEBHOOK_SECRET.",
            )
        check_url(url, private=self._settings.webhook_private)

    async def add(self, new: NewJob, uploads: Mapping[str, bytes]) -> Job:
        """Accept a job: on return it is on the disk, and will be processed to its end.

        Args:
            new: request for the job.
            uploads: its pictures by field, as they were sent.

        Raises:
            Overloaded: its owner already has the maximum number of waiting jobs.
            ReusedKey: its idempotency key was used with another body.
            JobsUnavailable: the database cannot be reached, or its disk is full.
            NotReady: its pictures could not be stored.
        """
        # Most repetitions are found here, before their pictures are stored again.
        same = await self._database.run(store.repeated, new.owner, new.idempotency_key, new.digest)
        if same is not None:
            return same
        try:
            for field, data in uploads.items():
                await self._blobs.write(upload_name(new.id, field), data)
            job = await self._database.run(store.add, new, self._settings.waiting, time.time())
        except JobsUnavailable:
            # If the connection was lost, the job may have been stored before, with its pictures.
            if self._database.reachable:
                with suppress(OSError):
                    await self._blobs.delete([new.id])
            raise
        except WeftError:
            await self._blobs.delete([new.id])
            raise
        except OSError as error:
            log.error("the pictures of a job could not be stored: %s", error)
            with suppress(OSError):
                await self._blobs.delete([new.id])
            raise NotReady("The prediction could not be stored; try again later.") from None
        if job.id != new.id:
            await self._blobs.delete([new.id])
        self._runner.wake()
        return job

    async def get(self, owner: str, identifier: str) -> Job:
        """Return a job of an owner; raises UnknownJob if it does not exist."""
        _check(identifier)
        return await self._database.run(store.get, owner, identifier)

    async def page(self, owner: str, after: str | None, count: int) -> list[Job]:
        """Return up to `count` jobs of an owner after `after`, newest first; raises UnknownJob."""
        if after is not None:
            _check(after)
        return await self._database.run(store.page, owner, after, count)

    async def positions(self, jobs: list[Job]) -> dict[str, int]:
        """Number of jobs that will begin before each of these, for those that wait.

        Empty while the database cannot be used.
        """
        waiting = [job.id for job in jobs if job.status == "starting"]
        if not waiting:
            return {}
        try:
            return await self._database.run(store.positions, waiting)
        except JobsUnavailable:
            return {}

    async def cancel(self, owner: str, identifier: str) -> Job:
        """Cancel a job, unless it has ended; raises UnknownJob."""
        _check(identifier)
        job = await self._database.run(
            store.cancel, owner, identifier, self._settings.keep_s, time.time()
        )
        self._runner.cancel(identifier)
        self.watches.tell(identifier)
        return job

    async def picture(self, job: Job, index: int) -> bytes:
        """Read a picture of a job that succeeded.

        Raises:
            UnknownJob: it was deleted.
            NotReady: the storage of the pictures cannot be read.
        """
        attempt = 0 if job.result is None else job.result["attempt"]
        try:
            return await self._blobs.read(output_name(job.id, attempt, index))
        except FileNotFoundError:
            raise UnknownJob(job.id) from None
        except OSError as error:
            log.error("an image of job %s could not be read: %s", job.id, error)
            raise NotReady("The image cannot be read now; try again later.") from None

    async def ended(self, job: Job, within_s: float) -> Job:
        """Wait until a job has ended, a time has passed, or the server stops.

        Returns:
            Its state, as last known if the database cannot be used: the job was accepted.
        """
        until = time.monotonic() + within_s
        with self.watches.on(job.id) as watch:
            while not job.ended and not self.leaving.is_set():
                with suppress(JobsUnavailable):
                    job = await self.get(job.owner, job.id)
                left = until - time.monotonic()
                if job.ended or left <= 0:
                    break
                await watch.news(min(left, LOOK_S))
        return job

    async def _count(self) -> None:
        while True:
            self.counts = await self._database.run(store.counts)
            await asyncio.sleep(COUNT_S)


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Repeat some work whenever it fails, as it does while the database cannot be reached."""
    while True:
        try:
            await work()
        except JobsUnavailable:
            # The database has said so.
            await asyncio.sleep(AGAIN_S)
        except OSError as error:
            log.error("durable jobs: their pictures cannot be used, and are tried again: %s", error)
            await asyncio.sleep(PICTURES_AGAIN_S)
        except Exception:
            log.exception("durable jobs: an operation failed and will be retried")
            await asyncio.sleep(AGAIN_S)


def _check(identifier: str) -> None:
    """Refuse a text that cannot be an identifier, and may not even be valid for the database."""
    if not (identifier.isascii() and identifier.isalnum()):
        raise UnknownJob(identifier)


def _database(settings: JobSettings) -> Database:
    if settings.database is not None:
        return of_url(settings.database.get_secret_value())
    return of_folder(settings.place_of_jobs)

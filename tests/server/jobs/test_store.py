"""What the database guarantees: each job ends once, and owners take turns."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, LargeBinary, Text, literal, text, update

from server.errors import JobsUnavailable, NotReady, Overloaded, ReusedKey, UnknownJob
from server.jobs import store
from server.jobs.database import Database, of_folder
from server.jobs.job import Job, NewJob
from server.jobs.jobs import Jobs
from server.jobs.tables import JOBS
from server.jobs.watching import Watch
from server.service.service import Service
from server.settings import Limits, Settings
from tests.server.toy_model import Toy, started

LEASE_S = 30.0
KEEP_S = 100.0
OWNERS = ["a", "b"]
PATIENCE_S = 60.0

Work = Callable[[Database], Awaitable[None]]


def new(owner: str = "a", key: str | None = None, digest: str = "d", **more: Any) -> NewJob:
    fields: dict[str, Any] = {"webhook": None, "webhook_events": ()} | more
    return NewJob(uuid.uuid4().hex, owner, {"prompt": "x"}, (), digest, key, **fields)


@asynccontextmanager
async def opened(folder: Path) -> AsyncGenerator[Database]:
    database = await asyncio.to_thread(of_folder, folder)
    try:
        yield database
    finally:
        database.close()


def with_database(folder: Path, work: Work) -> None:
    async def run() -> None:
        async with opened(folder) as database:
            await work(database)

    asyncio.run(run())


async def added(database: Database, *owners: str) -> list[Job]:
    return [await database.run(store.add, new(owner), 100, 1.0) for owner in owners]


def test_a_late_result_of_an_old_attempt_is_refused(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        for _ in range(25):
            await added(database, "a")
            old = await database.run(store.begin, "one", LEASE_S, 10.0, OWNERS)
            assert old is not None
            later = 11.0 + LEASE_S
            again = await database.run(store.begin, "two", LEASE_S, later, OWNERS)
            assert again is not None
            assert (again.id, again.attempt) == (old.id, 2)
            finish = store.finish
            assert not await database.run(finish, old, "succeeded", KEEP_S, later, result={"by": 1})
            assert await database.run(finish, again, "succeeded", KEEP_S, later, result={"by": 2})
            assert not await database.run(finish, again, "failed", KEEP_S, later)
            ended = await database.run(store.get, "a", old.id)
            assert (ended.status, ended.result) == ("succeeded", {"by": 2})

    with_database(tmp_path, work)


def test_a_lease_that_is_renewed_is_kept_and_a_cancelled_job_loses_it(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        one, other = await added(database, "a", "a")
        for _ in range(2):
            await database.run(store.begin, "w", LEASE_S, 10.0, OWNERS)
        await database.run(store.cancel, "a", other.id, KEEP_S, 20.0)
        kept = await database.run(store.renew, "w", [one.id, other.id], LEASE_S, 35.0)
        assert kept == {one.id}
        assert await database.run(store.begin, "x", LEASE_S, 60.0, OWNERS) is None
        assert await database.run(store.begin, "w", LEASE_S, 99.0, OWNERS, [one.id]) is None
        with pytest.raises(UnknownJob):
            await database.run(store.cancel, "b", one.id, KEEP_S, 60.0)

    with_database(tmp_path, work)


def test_one_key_and_body_are_one_job_also_at_once(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        posts = (database.run(store.add, new(key="k"), 100, 1.0) for _ in range(100))
        assert len({job.id for job in await asyncio.gather(*posts)}) == 1
        assert (await database.run(store.add, new("b", "k"), 100, 1.0)).owner == "b"
        with pytest.raises(ReusedKey):
            await database.run(store.add, new(key="k", digest="other"), 100, 1.0)

    with_database(tmp_path, work)


def test_owners_take_turns_and_positions_say_so(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        jobs = await added(database, "a", "a", "a", "b", "b")
        promised = await database.run(store.positions, [job.id for job in jobs])
        begun = [await database.run(store.begin, "w", LEASE_S, 2.0, OWNERS) for _ in jobs]
        order = [job.id for job in begun if job is not None]
        assert sorted(promised, key=lambda one: promised[one]) == order
        assert [job.owner for job in begun if job is not None] == ["a", "b", "a", "b", "a"]

    with_database(tmp_path, work)


def test_jobs_of_a_removed_key_are_never_begun_and_fail_by_name(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        job, kept, late = await added(database, "removed", "a", "removed")
        await database.run(store.begin, "w", LEASE_S, 10.0, ["removed"])
        error = {"message": "m", "code": "c", "param": None}
        disown = store.disown, ["a"], 5.0, error, KEEP_S
        # Another server works on the first one.
        assert await database.run(*disown, 20.0) == [late.id]
        assert await database.run(*disown, 11.0 + LEASE_S) == [job.id]
        ended = await database.run(store.get, "removed", job.id)
        assert (ended.status, ended.error) == ("failed", error)
        (accepted_later,) = await added(database, "removed")
        assert await database.run(store.disown, ["a"], 0.5, error, KEEP_S, 99.0) == []
        begun = [await database.run(store.begin, "w", LEASE_S, 99.0, ["a"]) for _ in range(2)]
        assert [one and one.id for one in begun] == [kept.id, None]
        waiting = await database.run(store.get, "removed", accepted_later.id)
        assert waiting.status == "starting"

    with_database(tmp_path, work)


@pytest.mark.parametrize("keys", [[], ["another key of the server"]])
def test_a_server_without_a_job_s_key_fails_it_when_it_starts(
    tmp_path: Path, keys: list[str]
) -> None:
    async def before(database: Database) -> None:
        identifiers.extend(job.id for job in await added(database, "removed"))

    async def start() -> Job:
        settings = Settings.model_validate({"jobs": {"folder": tmp_path}, "api_keys": keys})
        service = Service(Limits())
        jobs = Jobs(settings, service, lambda _: b"")
        await jobs.open()
        try:
            return await jobs.ended(await jobs.get("removed", identifiers[0]), PATIENCE_S)
        finally:
            await jobs.close()
            service.close()

    identifiers: list[str] = []
    with_database(tmp_path, before)
    job = asyncio.run(start())
    assert job.error is not None
    assert job.error["code"] == "key_removed"


def all_ended(folder: Path, jobs: list[Job]) -> list[Job]:
    """The jobs after a server that finds them when it starts has ended them."""

    async def start() -> list[Job]:
        engine, service = started(model := Toy(), 8), Service(Limits())
        service.open(engine, {"toy": model})
        settings = Settings.model_validate({"jobs": {"folder": folder}})
        open_jobs = Jobs(settings, service, lambda _: b"")
        await open_jobs.open()
        try:
            return [await open_jobs.ended(job, PATIENCE_S) for job in jobs]
        finally:
            await open_jobs.close()
            service.close()
            engine.stop(0)

    return asyncio.run(start())


@pytest.mark.parametrize(
    ("column", "damage"),
    [
        ("input", b"[5]"),
        ("input", b'{"prompt": '),
        ("input", b'{"prompt": "\xff"}'),
        ("input", b"[" * 100_000),
        ("uploads", b"5"),
        ("webhook_events", b"null"),
    ],
)
def test_a_damaged_job_ends_by_itself_and_holds_up_no_other(
    column: str, damage: bytes, tmp_path: Path
) -> None:
    jobs: list[Job] = []

    async def before(database: Database) -> None:
        told = new("", webhook="http://127.0.0.1:9/", webhook_events=("completed",))
        jobs.append(await database.run(store.add, told, 100, 1.0))
        jobs.extend(await added(database, ""))

        def spoil(connection: Connection) -> None:
            value = literal(damage, LargeBinary).cast(Text)
            connection.execute(update(JOBS).where(JOBS.c.id == jobs[0].id).values({column: value}))

        await database.run(spoil)

    with_database(tmp_path, before)
    spoilt, other = all_ended(tmp_path, jobs)
    assert other.status == "succeeded"
    assert spoilt.ended
    if column == "input":
        assert spoilt.error is not None
        assert spoilt.error["message"] == "The stored request is damaged; send it again."


def test_a_job_whose_plug_in_is_gone_fails_with_the_reason(tmp_path: Path) -> None:
    jobs: list[Job] = []

    async def before(database: Database) -> None:
        fields = {"prompt": "x", "sampler": "of_a_plug_in"}
        asked = NewJob(uuid.uuid4().hex, "", fields, (), "d", None, webhook=None, webhook_events=())
        jobs.append(await database.run(store.add, asked, 100, 1.0))

    with_database(tmp_path, before)
    [job] = all_ended(tmp_path, jobs)
    assert job.error is not None
    assert job.error["param"] == "input.sampler"
    assert job.error["message"].startswith("sampler 'of_a_plug_in' is unknown; allowed are: ")


def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        later = text("UPDATE alembic_version SET version_num = '9999'")
        await database.run(Connection.execute, later)

    with_database(tmp_path, work)
    with pytest.raises(
        NotReady, match="does not belong to this version of Weft: Can't locate revision"
    ):
        of_folder(tmp_path)


def test_more_than_may_wait_are_refused(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        await added(database, "a", "a")
        with pytest.raises(Overloaded):
            await database.run(store.add, new("a"), 2, 1.0)
        await database.run(store.add, new("b"), 2, 1.0)

    with_database(tmp_path, work)


def test_pages_go_from_the_newest_to_the_oldest(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        jobs = await added(database, "a", "b", "a", "a")
        own = [jobs[3].id, jobs[2].id, jobs[0].id]
        first = await database.run(store.page, "a", None, 2)
        assert [job.id for job in first] == own[:2]
        rest = await database.run(store.page, "a", first[-1].id, 2)
        assert [job.id for job in rest] == own[2:]
        with pytest.raises(UnknownJob):
            await database.run(store.page, "a", jobs[1].id, 2)

    with_database(tmp_path, work)


def test_ended_jobs_expire_with_their_webhooks(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        told: dict[str, Any] = {"webhook": "https://x.example", "webhook_events": ("completed",)}
        job = await database.run(store.add, new(**told), 9, 1.0)
        await added(database, "a")
        await database.run(store.cancel, "a", job.id, KEEP_S, 10.0)
        (delivery,) = await database.run(store.due, 10.0, 9)
        assert (delivery.job.id, delivery.event) == (job.id, "completed")
        assert await database.run(store.due, 11.0, 9) == []
        assert await database.run(store.expired, 10.0 + KEEP_S, 9) == []
        assert await database.run(store.expired, 11.0 + KEEP_S, 9) == [job.id]
        await database.run(store.forget, [job.id])
        assert await database.run(store.due, 1e9, 9) == []

    with_database(tmp_path, work)


def test_the_database_is_durable_and_one_server_s(tmp_path: Path) -> None:
    def pragma(connection: Connection, name: str) -> Any:
        return connection.execute(text(f"PRAGMA {name}")).scalar_one()

    async def work(database: Database) -> None:
        assert await database.run(pragma, "journal_mode") == "wal"
        assert await database.run(pragma, "synchronous") == 2
        await added(database, "a")
        with pytest.raises(NotReady, match="another server uses"):
            of_folder(tmp_path)

    with_database(tmp_path, work)

    async def again(database: Database) -> None:
        assert len(await database.run(store.page, "a", None, 9)) == 1

    with_database(tmp_path, again)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_nobody_else_may_read_the_database_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    modes: dict[str, int] = {}

    def look() -> None:
        modes.update({one.name: one.stat().st_mode & 0o777 for one in tmp_path.glob("jobs.*")})

    async def work(database: Database) -> None:
        await added(database, "a")
        look()

    before = os.umask(mask)
    try:
        with_database(tmp_path, work)
    finally:
        os.umask(before)
    assert modes == {f"jobs.sqlite{kind}": 0o600 for kind in ("", "-shm", "-wal")}


def test_a_database_that_others_may_read_is_made_private(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite"
    file.touch()
    file.chmod(0o644)

    async def work(database: Database) -> None:
        assert file.stat().st_mode & 0o777 == 0o600

    with_database(tmp_path, work)


def test_a_database_whose_permissions_cannot_be_changed_is_used_and_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the file is another user's, or on a file system without permissions."""

    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    async def work(database: Database) -> None:
        assert len(await added(database, "a")) == 1

    monkeypatch.setattr(os, "fchmod", refuse)
    with_database(tmp_path, work)
    assert f"the permissions of {tmp_path / 'jobs.sqlite'} cannot be changed" in caplog.text


def test_a_job_for_which_the_disk_has_no_room_is_refused_and_nothing_of_it_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(database: Database) -> None:
        await database.run(lambda connection: connection.execute(text("PRAGMA max_page_count=1")))
        large = new(webhook="x" * 100_000)
        for _ in range(2):
            with pytest.raises(JobsUnavailable):
                await database.run(store.add, large, 100, 1.0)
        assert database.reachable
        assert await database.run(store.page, "a", None, 9) == []

    with_database(tmp_path, work)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "weft"]
    assert line.endswith("tried again: database or disk is full")


@pytest.mark.parametrize("turns", range(4))
def test_a_server_that_is_woken_when_it_stops_stops(tmp_path: Path, turns: int) -> None:
    """Whatever the event loop has done by then of what wakes its search for jobs."""

    async def run() -> None:
        service = Service(Limits())
        jobs = Jobs(Settings.model_validate({"jobs": {"folder": tmp_path}}), service, lambda _: b"")
        await jobs.open()
        await asyncio.sleep(0.05)
        jobs._runner.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(jobs.close(), PATIENCE_S)
        service.close()

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(4))
def test_a_reader_that_is_cancelled_as_there_is_news_is_cancelled(turns: int) -> None:
    async def run() -> None:
        watch = Watch()
        reading = asyncio.create_task(watch.news(60))
        await asyncio.sleep(0.01)
        watch.tell(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        ended = reading.done()
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled() is not ended

    asyncio.run(run())

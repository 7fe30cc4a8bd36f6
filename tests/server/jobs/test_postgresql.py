"""Two servers share a PostgreSQL database, Debian's, which the test starts."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from server.jobs import store
from server.jobs.database import Database, of_url
from tests.server.jobs.test_store import KEEP_S, LEASE_S, new

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture
def url() -> Iterator[str]:
    if not FOUND:
        pytest.skip("Debian's package postgresql is not installed")
    # PostgreSQL does not run as root, and does not reach into pytest's folders.
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp())
    if user is not None:
        shutil.chown(folder, user)
    data = folder / "data"
    quiet: dict[str, Any] = {"user": user, "stdout": subprocess.DEVNULL, "cwd": folder}
    programs = FOUND[-1].parent
    setting_up = [programs / "initdb", "-D", data, "-A", "trust", "-U", "weft", "--no-sync"]
    subprocess.run(setting_up, check=True, **quiet)
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    control = [programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, **quiet)
    yield f"postgresql:///postgres?host={folder}&user=weft"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet)
    shutil.rmtree(folder)


def test_servers_share_jobs_and_each_is_begun_and_ended_once(url: str) -> None:
    asyncio.run(_share(url))


async def _share(url: str) -> None:
    # Both find an empty database.
    servers = await asyncio.gather(*(asyncio.to_thread(of_url, url) for _ in range(2)))
    try:
        await _one_key_is_one_job(*servers)
        await _each_is_begun_once(*servers)
    finally:
        for database in servers:
            database.close()


async def _one_key_is_one_job(one: Database, other: Database) -> None:
    posts = [
        database.run(store.add, new(key="k", webhook="https://x.example"), 100, 1.0)
        for _ in range(50)
        for database in (one, other)
    ]
    (identifier,) = {job.id for job in await asyncio.gather(*posts)}
    await one.run(store.cancel, "a", identifier, KEEP_S, 2.0)


async def _each_is_begun_once(one: Database, other: Database) -> None:
    told: dict[str, Any] = {"webhook": "https://x.example", "webhook_events": ("completed",)}
    accepted = [await one.run(store.add, new(owner, **told), 100, 1.0) for owner in "aabbaabb"]
    assert len(await other.run(store.positions, [job.id for job in accepted])) == len(accepted)

    async def begin(database: Database, worker: str) -> list[Any]:
        found: list[Any] = []
        while job := await database.run(store.begin, worker, LEASE_S, 3.0, ["a", "b"]):
            found.append(job)
        return found

    begun = list(chain(*await asyncio.gather(begin(one, "one"), begin(other, "other"))))
    assert Counter(job.id for job in begun) == Counter(job.id for job in accepted)
    again = await other.run(store.begin, "other", LEASE_S, 4.0 + LEASE_S, ["a", "b"])
    assert again is not None
    assert again.attempt == 2
    first = next(job for job in begun if job.id == again.id)
    ends = [
        database.run(store.finish, job, "succeeded", KEEP_S, 40.0, result={"attempt": job.attempt})
        for database, job in ((one, first), (other, again), (one, again))
    ]
    assert sorted(await asyncio.gather(*ends)) == [False, False, True]
    ended = await one.run(store.get, again.owner, again.id)
    assert ended.result == {"attempt": 2}
    due = await asyncio.gather(*(database.run(store.due, 50.0, 9) for database in (one, other)))
    assert [delivery.job.id for delivery in chain(*due)] == [again.id]
    await one.run(store.forget, [job.id for job in accepted])
    assert await other.run(store.page, "b", None, 9) == []

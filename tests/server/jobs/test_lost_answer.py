"""A connection that is lost after the database has stored the end of a job."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.blobs import Blobs
from server.errors import JobsUnavailable
from server.jobs import store
from server.jobs.database import Database
from tests.server.jobs.test_full_disk import PATIENCE_S, opened, pictures
from tests.server.jobs.test_store import new


def test_a_job_whose_end_is_stored_twice_keeps_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"prompt": "x", "steps": 1, "guidance": "none"}
    ends: list[bool] = []
    tidied = asyncio.Event()
    run_one, delete = Database.run, Blobs.delete

    async def lose_the_first_end(database: Database, work: Any, *given: Any, **named: Any) -> Any:
        done = await run_one(database, work, *given, **named)
        if isinstance(work, partial) and work.func is store.finish:
            ends.append(done)
            if len(ends) == 1:
                raise JobsUnavailable
        return done

    async def note(blobs: Blobs, names: list[str]) -> None:
        await delete(blobs, names)
        if len(ends) == 2:
            tidied.set()

    async def run() -> None:
        async with opened(tmp_path) as jobs:
            await jobs.add(replace(new(""), input=given), {})
            await asyncio.wait_for(tidied.wait(), PATIENCE_S)
            [job] = await jobs.page("", None, 9)
            assert job.status == "succeeded"

    monkeypatch.setattr(Database, "run", lose_the_first_end)
    monkeypatch.setattr(Blobs, "delete", note)
    asyncio.run(run())
    assert len(pictures(tmp_path)) == 1

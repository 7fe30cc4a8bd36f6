"""What happens if the disk is full when the pictures of a job are stored."""

from __future__ import annotations

import asyncio
import errno
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy import Connection, text

from server.blobs import Blobs
from server.errors import JobsUnavailable, NotReady
from server.jobs.jobs import Jobs
from server.service.service import Service
from server.settings import Limits, Settings
from tests.server.jobs.test_store import new
from tests.server.toy_model import Toy, started

PATIENCE_S = 30.0


@asynccontextmanager
async def opened(folder: Path, attempts: int = 1) -> AsyncGenerator[Jobs]:
    """Jobs of the toy model."""
    engine, service = started(model := Toy(), 8), Service(Limits())
    service.open(engine, {"toy": model})
    settings = Settings.model_validate({"jobs": {"folder": folder, "attempts": attempts}})
    jobs = Jobs(settings, service, lambda _: b"")
    await jobs.open()
    try:
        yield jobs
    finally:
        await jobs.close()
        service.close()
        engine.stop(0)


@pytest.fixture
def room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave room for only one more picture."""
    write, room = Blobs.write, [True]

    async def bounded(blobs: Blobs, name: str, data: bytes) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room.pop()
        await write(blobs, name, data)

    monkeypatch.setattr(Blobs, "write", bounded)


def pictures(folder: Path) -> list[Path]:
    return [path for path in (folder / "pictures").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("room_for_one")
def test_a_job_whose_pictures_have_no_room_is_refused_and_leaves_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with opened(tmp_path) as jobs:
            uploads = {"image": b"a picture", "mask": b"another"}
            with pytest.raises(NotReady, match="could not be stored; try again later"):
                await jobs.add(replace(new(""), uploads=tuple(uploads)), uploads)
            assert await jobs.page("", None, 9) == []

    asyncio.run(run())
    assert pictures(tmp_path) == []
    assert "Traceback" not in caplog.text


@pytest.mark.usefixtures("room_for_one")
def test_a_job_whose_images_have_no_room_fails_and_leaves_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"prompt": "x", "n": 2, "steps": 1, "guidance": "none"}

    async def run() -> None:
        async with opened(tmp_path) as jobs:
            job = await jobs.add(replace(new(""), input=given), {})
            ended = await jobs.ended(job, PATIENCE_S)
            assert ended.status == "failed"
            assert ended.error is not None
            assert ended.error["message"].startswith("The images could not be stored; ")

    asyncio.run(run())
    assert pictures(tmp_path) == []
    assert "Traceback" not in caplog.text


def test_a_job_for_which_the_database_has_no_room_leaves_no_pictures(tmp_path: Path) -> None:
    def fill(connection: Connection) -> None:
        connection.execute(text("PRAGMA max_page_count=1"))

    async def run() -> None:
        async with opened(tmp_path) as jobs:
            await jobs._database.run(fill)
            large = replace(new("", webhook="x" * 100_000), uploads=("image",))
            with pytest.raises(JobsUnavailable):
                await jobs.add(large, {"image": b"a picture"})

    asyncio.run(run())
    assert pictures(tmp_path) == []


def test_a_job_whose_pictures_cannot_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"prompt": "x", "steps": 1, "guidance": "none"}
    read, failures = Blobs.read, [OSError("EndpointConnectionError")]

    async def fail_once(blobs: Blobs, name: str) -> bytes:
        if failures:
            raise failures.pop()
        return await read(blobs, name)

    Image.new("RGB", (64, 64)).save(picture := BytesIO(), "PNG")

    async def run() -> None:
        async with opened(tmp_path, attempts=2) as jobs:
            new_job = replace(new(""), input=given, uploads=("image",))
            job = await jobs.add(new_job, {"image": b64encode(picture.getvalue())})
            ended = await jobs.ended(job, PATIENCE_S)
            assert (ended.status, ended.attempt) == ("succeeded", 2)

    monkeypatch.setattr(Blobs, "read", fail_once)
    monkeypatch.setattr("server.jobs.runner.LONGEST_WAIT_S", 0.0)
    asyncio.run(run())
    assert "Traceback" not in caplog.text


def test_a_job_whose_pictures_cannot_be_deleted_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"prompt": "x", "steps": 1, "guidance": "none"}
    delete, tried = Blobs.delete, asyncio.Event()

    async def fail(blobs: Blobs, names: list[str]) -> None:
        if any(name.endswith("/image") for name in names):
            tried.set()
            raise OSError("EndpointConnectionError")
        await delete(blobs, names)

    Image.new("RGB", (64, 64)).save(picture := BytesIO(), "PNG")

    async def run() -> None:
        async with opened(tmp_path) as jobs:
            new_job = replace(new(""), input=given, uploads=("image",))
            job = await jobs.add(new_job, {"image": b64encode(picture.getvalue())})
            await asyncio.wait_for(tried.wait(), PATIENCE_S)
            assert (await jobs.ended(job, PATIENCE_S)).status == "succeeded"

    monkeypatch.setattr(Blobs, "delete", fail)
    asyncio.run(run())
    assert "could not be deleted: EndpointConnectionError" in caplog.text
    assert "was not stored" not in caplog.text


def test_a_store_of_pictures_that_fails_is_one_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = asyncio.Event()

    async def fail(_: Blobs) -> None:
        tried.set()
        raise OSError("EndpointConnectionError")

    async def run() -> None:
        async with opened(tmp_path):
            await asyncio.wait_for(tried.wait(), PATIENCE_S)

    monkeypatch.setattr(Blobs, "sizes", fail)
    asyncio.run(run())
    said = [record for record in caplog.records if "EndpointConnectionError" in record.getMessage()]
    assert [(record.levelname, record.exc_info) for record in said] == [("ERROR", None)]

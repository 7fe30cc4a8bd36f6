"""Images at URLs exist for their lifetime, and take no more room than allowed."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.implementations.local import LocalFileSystem

from server.errors import InvalidRequest, NotReady, UnknownResult
from server.locked_folders import locked
from server.results import Results

FILE = b"\x89PNG" + bytes(96)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def gone(store: Results, name: str) -> bool:
    try:
        await store.read(name)
    except UnknownResult:
        return True
    return False


def test_an_image_is_deleted_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.25

    async def work() -> None:
        nonlocal now
        store = Results(str(tmp_path), 0.5, 1000)
        (kept,) = await store.keep("", "png", [FILE])
        assert kept.expires_at == 1_800_000_001
        assert await store.read(kept.name) == (FILE, 0.75)
        now = 1_800_000_001.0
        assert await gone(store, kept.name)
        await until(lambda: files(tmp_path) == set())
        await store.close()

    monkeypatch.setattr("server.results.time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr("server.results.MAX_SLEEP_S", 0.01)
    run(work)


def test_a_process_goes_on_where_another_was_killed(tmp_path: Path) -> None:
    async def first() -> None:
        (kept,) = await Results(str(tmp_path), 3600, 1000).keep("", "png", [FILE])
        names.append(kept.name)

    async def second() -> None:
        for name in (old, f"{old}.part"):
            (tmp_path / name).write_bytes(FILE)
        store = Results(str(tmp_path), 3600, 250)
        await store.open()
        await until(lambda: files(tmp_path) == {*names, "notes.txt"})
        assert (await store.read(names[0]))[0] == FILE
        # Files found at the start count.
        await store.keep("", "png", [FILE, FILE])
        assert await gone(store, names[0])
        await store.close()

    names: list[str] = []
    old = f"{int(time.time()) - 9:08x}-{'x' * 32}.png"
    (tmp_path / "notes.txt").write_text("of the operator")
    run(first)
    run(second)


def test_beyond_the_bound_whoever_has_most_loses_the_oldest(tmp_path: Path) -> None:
    async def work() -> None:
        store = Results(str(tmp_path), 3600, 500)
        (few,) = await store.keep("one", "png", [FILE])
        first, second, third, fourth = await store.keep("another", "png", [FILE] * 4)
        (more,) = await store.keep("one", "webp", [FILE])
        assert files(tmp_path) == {one.name for one in (few, second, third, fourth, more)}
        assert await gone(store, first.name)
        with pytest.raises(InvalidRequest, match="at most 500 are kept"):
            await store.keep("one", "png", [bytes(501)])
        await store.close()

    run(work)


def test_whoever_would_have_most_makes_room_for_it(tmp_path: Path) -> None:
    async def work() -> None:
        store = Results(str(tmp_path), 3600, 500)
        await store.keep("one", "png", [FILE] * 2)
        others = await store.keep("another", "png", [FILE[:-1]] * 3)
        again = await store.keep("one", "png", [FILE] * 2)
        assert files(tmp_path) == {one.name for one in (*others, *again)}
        await store.close()

    run(work)


def test_no_name_is_guessed_or_leads_elsewhere(tmp_path: Path) -> None:
    async def work() -> None:
        store = Results(str(tmp_path / "results"), 3600, 1000)
        kept = await store.keep("", "png", [FILE, FILE])
        tokens = {one.name[9:-4] for one in kept}
        assert len(tokens) == 2
        assert all(len(token) == 32 for token in tokens)
        later = f"{kept[0].expires_at + 60:08x}{kept[0].name[8:]}"
        for name in (later, "", "..", "../secret", kept[0].name[:-4], f"{kept[0].name}.part"):
            assert await gone(store, name), name
        await store.close()

    (tmp_path / "secret").write_bytes(FILE)
    run(work)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ffffffff-" + "A" * 32 + ".png", "no WEFT_RESULTS__PLACE in common with this one."),
        ("00000001-" + "A" * 32 + ".png", "There is no image at this URL; it has expired."),
        ("picture.png", "There is no image at this URL."),
    ],
)
def test_why_an_image_may_not_be_found_is_said(tmp_path: Path, name: str, said: str) -> None:
    async def work() -> None:
        with pytest.raises(UnknownResult) as refusal:
            await Results(str(tmp_path), 3600, 1000).read(name)
        assert refusal.value.message.endswith(said)

    run(work)


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    async def work() -> None:
        for place, said in ((__file__, "kept for URLs"), ("nothing://x", "nothing")):
            with pytest.raises(NotReady, match=said):
                await Results(place, 3600, 1000).open()

    run(work)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_of_the_log_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        store = Results(str(tmp_path), 3600, 1000)
        await store.open()
        syncs = iter([os.fsync, full])
        # The second image has no room.
        monkeypatch.setattr("server.blobs.os.fsync", lambda file: next(syncs)(file))
        with pytest.raises(NotReady, match="could not be stored; try again later, or ask for"):
            await store.keep("", "png", [FILE, FILE])
        await store.close()

    monkeypatch.setattr("server.blobs._sync_folders", lambda _: None)
    run(work)
    assert files(tmp_path) == set()
    (record,) = caplog.records
    assert record.getMessage().endswith("No space left on device")
    assert record.exc_info is None


def test_an_image_that_cannot_be_read_now_may_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        store = Results(str(tmp_path), 3600, 1000)
        (kept,) = await store.keep("", "png", [FILE])
        monkeypatch.setattr(LocalFileSystem, "cat_file", full)
        with pytest.raises(NotReady, match="cannot be read now; try again later"):
            await store.read(kept.name)
        await store.close()

    run(work)


def test_the_log_has_no_name_of_an_image_that_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever knows the name can fetch the image without a key."""

    def fail(_: LocalFileSystem, path: str) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    async def work() -> None:
        store = Results(str(tmp_path), 3600, 1000)
        (kept,) = await store.keep("", "png", [FILE])
        monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
        with pytest.raises(NotReady):
            await store.read(kept.name)
        assert os.strerror(errno.EIO) in caplog.text
        assert kept.name not in caplog.text
        await store.close()

    run(work)


def test_what_cannot_be_written_is_given_up(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        store = Results(str(tmp_path / "results"), 3600, 150)
        await store.open()
        (tmp_path / "results").rmdir()
        (tmp_path / "results").write_bytes(b"")
        with pytest.raises(NotReady, match="b64_json"):
            await store.keep("", "png", [FILE])
        (tmp_path / "results").unlink()
        # It takes up no room.
        await store.keep("", "png", [FILE])
        await store.close()

    run(work)


def test_without_a_place_there_is_a_folder_that_ends_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        store = Results(None, 3600, 1000)
        await store.keep("", "png", [FILE])
        assert len(files(tmp_path)) == 1
        await store.close()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run(work)
    assert files(tmp_path) == set()


def test_a_temporary_folder_that_a_killed_server_left_is_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, new, other = (
        tmp_path / name for name in ("weft-results-a", "weft-results-b", "weft-results-c", "d")
    )
    for folder in (left, used, new, other):
        folder.mkdir()
        (folder / "image").write_bytes(FILE)
        if folder is not new:
            os.utime(folder, (0, 0))

    async def work() -> None:
        store = Results(None, 3600, 1000)
        await store.keep("", "png", [FILE])
        [own] = files(tmp_path) - {used.name, new.name, other.name}
        assert own != left.name
        await store.close()
        assert files(tmp_path) == {used.name, new.name, other.name}

    with locked(used, wait=False):
        run(work)

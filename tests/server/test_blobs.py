"""Files in a place that several servers write to, on a disk that may be full."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from server.blobs import Blobs

PATIENCE_S = 20


def test_two_servers_may_delete_the_same_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = os.remove

    def late(path: str) -> None:
        """Write as if another server had been faster by a moment."""
        remove(path)
        remove(path)

    names = ["one.png", "another.png"]
    for name in names:
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", late)
        asyncio.run(Blobs(str(tmp_path)).delete(names))
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        asyncio.run(Blobs(str(tmp_path)).write("taken", b"a picture"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_whatever_a_store_raises_is_an_error_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, botocore raises its own errors if a host cannot be reached."""

    def fail(*_: object) -> None:
        raise RuntimeError("Could not connect to the endpoint")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(OSError, match="RuntimeError: Could not connect to the endpoint"):
        asyncio.run(Blobs("memory://results").write("one.png", b"a picture"))


def test_a_store_that_answers_slowly_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Event()

    def slow(*_: object) -> bytes:
        assert answers.wait(PATIENCE_S)
        return b"a picture"

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        reading = [asyncio.ensure_future(store.read("one.png")) for _ in range(20)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(int, 5), PATIENCE_S / 2) == 5
        answers.set()
        assert await asyncio.gather(*reading) == [b"a picture"] * 20

    store = Blobs(str(tmp_path))
    monkeypatch.setattr(LocalFileSystem, "cat_file", slow)
    asyncio.run(run())


def test_a_store_that_does_not_answer_is_an_error_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More callers than threads, as those whose turn never comes must be told too."""
    monkeypatch.setattr("server.blobs.ANSWER_S", 0.3)
    monkeypatch.setattr("server.blobs.ANOTHER_S", 0.0)
    answers = Event()

    def hang(*_: object) -> bytes:
        assert answers.wait(PATIENCE_S)
        return b""

    async def run() -> None:
        store = Blobs(str(tmp_path))
        asked = [store.read("one.png") for _ in range(10)]
        asked += [store.write("one.png", b"a picture"), store.delete(["one.png"])]
        async with asyncio.timeout(PATIENCE_S / 2):
            ends = await asyncio.gather(*asked, return_exceptions=True)
        answers.set()
        assert all(isinstance(end, OSError) and end.errno == errno.ETIMEDOUT for end in ends)
        assert {end.filename for end in ends if isinstance(end, OSError)} == {str(tmp_path)}

    monkeypatch.setattr(LocalFileSystem, "cat_file", hang)
    asyncio.run(run())

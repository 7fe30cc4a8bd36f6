"""Files in a folder, or in any storage that fsspec can write to."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

__all__ = ["Blobs"]

UNFINISHED: Final = ".part"
THREADS: Final = 8

ANSWER_S: Final = 30.0
"""Seconds for reading or writing a file, and for deleting one, including the wait for a thread."""

ANOTHER_S: Final = 1.0
"""Seconds more for each file that is deleted with others."""

LIST_S: Final = 300.0
"""Seconds for listing all files."""

Result = TypeVar("Result")


class Blobs:
    """Files below one place, each of which exists completely or not at all.

    Names are made of the server's own identifiers, never of anything that a client sends. Every
    method raises OSError if the place fails, whatever the store behind a URL raises, and if it does
    not answer in time; it may then do later what it was asked for.

    Args:
        place: path, or URL for fsspec.

    Attributes:
        unfinished: suffix of a file that is being written, or whose writer was killed.
    """

    unfinished: Final = UNFINISHED

    def __init__(self, place: str) -> None:
        found: tuple[Any, str] = url_to_fs(place)
        self._files, self._root = found
        self._local = isinstance(self._files, LocalFileSystem)
        # A slow store must not occupy the threads that all requests need.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="weft-files")

    async def create(self) -> None:
        """Create the folder, if the place is one; raises OSError if that fails."""
        if self._local:
            folder = Path(self._root)
            await self._in_thread(
                ANSWER_S, partial(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            )

    async def write(self, name: str, data: bytes) -> None:
        """Store a file; on return it is on the disk, or in the store behind the URL."""
        await self._in_thread(ANSWER_S, partial(self._write, self._path(name), data))

    async def read(self, name: str) -> bytes:
        """Read a file; raises FileNotFoundError if it does not exist."""
        return await self._in_thread(ANSWER_S, partial(self._files.cat_file, self._path(name)))

    async def delete(self, names: Sequence[str]) -> None:
        """Delete files, and folders with their content, if they exist."""
        paths = [self._path(name) for name in names]
        within_s = ANSWER_S + ANOTHER_S * len(paths)
        await self._in_thread(within_s, partial(self._delete, paths))

    async def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the files at the top level, and 0 for each folder there."""

        def listed() -> dict[str, int]:
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return {}
            found: list[dict[str, Any]] = self._files.ls(self._root, True)
            return {
                one["name"].rstrip("/").rpartition("/")[2]: one["size"]
                if one["type"] == "file"
                else 0
                for one in found
            }

        return await self._in_thread(LIST_S, listed)

    async def _in_thread(self, within_s: float, work: Callable[[], Result]) -> Result:
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(within_s)
        try:
            async with limit:
                return await loop.run_in_executor(self._threads, work)
        except OSError as error:
            if limit.expired():
                sentence = f"no answer within {within_s:.0f} s"
                raise OSError(errno.ETIMEDOUT, sentence, self._root) from error
            raise
        except Exception as error:
            # Those of botocore, for example, if a host cannot be reached.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _write(self, path: str, data: bytes) -> None:
        if self._local:
            _write_durably(Path(path), data)
        else:
            # Object stores replace an object as a whole.
            self._files.pipe_file(path, data)

    def _delete(self, paths: Sequence[str]) -> None:
        self._files.invalidate_cache()
        for path in paths:
            # Another server with the same place may delete it at this moment.
            with suppress(FileNotFoundError):
                if self._files.exists(path):
                    self._files.rm(path, recursive=True)


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        # On a full disk, the unfinished file would keep the space.
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folders(path)


def _sync_folders(path: Path) -> None:
    """Make the name of a file, and those of folders that may be new, durable."""
    for folder in list(path.parents)[:3]:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

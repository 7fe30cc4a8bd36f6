"""Files in a folder, or wherever fsspec can write."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

__all__ = ["Blobs"]

UNFINISHED: Final = ".part"
THREADS: Final = 8

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Blobs:
    """Files below one place, which are there whole or not at all.

    Names are made of identifiers of the server's own, never of what a client sends.

    Args:
        place: a path, or a URL of fsspec.

    Attributes:
        unfinished: ends the name of a file that is being written, or whose writer was killed.
    """

    unfinished: Final = UNFINISHED

    def __init__(self, place: str) -> None:
        found: tuple[Any, str] = url_to_fs(place)
        self._files, self._root = found
        self._local = isinstance(self._files, LocalFileSystem)
        # A store that answers slowly is not to hold the threads that all requests need.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="weft-files")

    async def create(self) -> None:
        """Make the folder, if the place is one; raises OSError if there can be none."""
        if self._local:
            folder = Path(self._root)
            await self._in_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)

    async def write(self, name: str, data: bytes) -> None:
        """Store a file; on return it is on the disk, or with the store of the URL."""
        await self._in_thread(self._write, self._path(name), data)

    async def read(self, name: str) -> bytes:
        """A file; raises FileNotFoundError if there is none."""
        return await self._in_thread(self._files.cat_file, self._path(name))

    async def delete(self, names: Sequence[str]) -> None:
        """Delete files and folders with all that is in them, if they are there."""
        await self._in_thread(self._delete, [self._path(name) for name in names])

    async def sizes(self) -> dict[str, int]:
        """The bytes of each file at the top, and 0 of each folder there."""

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

        return await self._in_thread(listed)

    async def _in_thread(
        self, work: Callable[Given, Result], *given: Given.args, **named: Given.kwargs
    ) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *given, **named))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _write(self, path: str, data: bytes) -> None:
        if self._local:
            _write_durably(Path(path), data)
        else:
            # Stores of objects replace an object as a whole.
            self._files.pipe_file(path, data)

    def _delete(self, paths: Sequence[str]) -> None:
        self._files.invalidate_cache()
        for path in paths:
            # Another server of the same place may delete it at this moment.
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
        # A full disk would be filled by what was to be on it.
        unfinished.unlink(missing_ok=True)
        raise
    # The file's name, and those of the folders that may be new.
    for folder in list(path.parents)[:3]:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

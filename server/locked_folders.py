"""Folders that belong to a process, by which those of killed processes are known."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["locked", "remove_left"]


@contextmanager
def locked(folder: Path, *, wait: bool) -> Generator[bool]:
    """Lock a folder, which ends with the process at the latest; says whether that worked.

    Args:
        folder: to lock.
        wait: for whoever has locked it.

    Raises:
        OSError: it cannot be opened.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Another has it, or the file system has no locks.
            yield False
        else:
            yield True
    finally:
        os.close(opened)


def remove_left(parent: Path, prefix: str, *, older_than_s: float = 0.0) -> None:
    """Remove folders that no process has locked.

    Args:
        parent: of the folders.
        prefix: of their names.
        older_than_s: age of their last change, before which their process may be about to lock
            them.
    """
    for folder in parent.glob(f"{prefix}*"):
        # Another process may rename or remove it just now, or it is another user's.
        with suppress(OSError), locked(folder, wait=False) as left:
            if left and time.time() - folder.stat().st_mtime >= older_than_s:
                shutil.rmtree(folder, ignore_errors=True)

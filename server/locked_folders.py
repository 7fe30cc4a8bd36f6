"""Folders locked by their process, so that those of killed processes are recognized."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["locked", "remove_abandoned"]


@contextmanager
def locked(folder: Path, *, wait: bool) -> Generator[bool]:
    """Lock a folder, until the process ends at the latest; yields whether that succeeded.

    Args:
        folder: folder to lock.
        wait: whether to wait for another process that has locked it.

    Raises:
        OSError: the folder cannot be opened.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Another process holds the lock, or the file system has no locks.
            yield False
        else:
            yield True
    finally:
        os.close(opened)


def remove_abandoned(parent: Path, prefix: str, *, older_than_s: float = 0.0) -> None:
    """Remove folders that no process has locked.

    Args:
        parent: folder that contains them.
        prefix: prefix of their names.
        older_than_s: minimum age of their last change; the process of a newer one may be about to
            lock it.
    """
    for folder in parent.glob(f"{prefix}*"):
        # Another process may rename or remove it at this moment, or it may belong to another user.
        with suppress(OSError), locked(folder, wait=False) as left:
            if left and time.time() - folder.stat().st_mtime >= older_than_s:
                shutil.rmtree(folder, ignore_errors=True)

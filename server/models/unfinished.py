"""Folders that are being filled, of which those of killed processes are removed."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["unfinished"]

PREFIX: Final = ".unfinished-"


@contextmanager
def unfinished(parent: Path) -> Generator[Path]:
    """A new folder to fill within the ``with`` block, and to give another name at its end.

    It is locked for so long, by which others of this and other processes know that it is in use. It
    is removed if filling it fails, and those of processes that were killed are removed here.

    Args:
        parent: where it is made.

    Raises:
        OSError: the parent cannot be written.
    """
    with ExitStack() as held:
        # One after another, so that nobody takes a new folder for one that was left.
        with _locked(parent, wait=True):
            _remove_left(parent)
            made = Path(mkdtemp(dir=parent, prefix=PREFIX))
            held.enter_context(_locked(made, wait=False))
        try:
            yield made
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def _remove_left(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        # Another process may give it its name just now.
        with suppress(FileNotFoundError), _locked(folder, wait=False) as left:
            if left:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Generator[bool]:
    """Lock a folder, which ends with the process at the latest; says whether that worked."""
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

"""Folders that are being filled, of which those of killed processes are removed."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Final

from server.locked_folders import locked, remove_left

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
        with locked(parent, wait=True):
            remove_left(parent, PREFIX)
            made = Path(mkdtemp(dir=parent, prefix=PREFIX))
            held.enter_context(locked(made, wait=False))
        try:
            yield made
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

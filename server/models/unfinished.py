"""Folders that are being filled; those left by killed processes are removed."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Final

from server.locked_folders import locked, remove_abandoned

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["unfinished"]

PREFIX: Final = ".unfinished-"


@contextmanager
def unfinished(parent: Path) -> Generator[Path]:
    """Create a folder to be filled inside the ``with`` block and renamed at its end.

    It is locked inside the block, which tells other threads and processes that it is in use. If the
    block fails, the folder is removed. Folders left by killed processes are removed before.

    Args:
        parent: folder in which it is created.

    Raises:
        OSError: the parent cannot be written.
    """
    with ExitStack() as held:
        # One thread at a time, so that nobody removes a new folder that is not locked yet.
        with locked(parent, wait=True):
            remove_abandoned(parent, PREFIX)
            made = Path(mkdtemp(dir=parent, prefix=PREFIX))
            held.enter_context(locked(made, wait=False))
        try:
            yield made
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

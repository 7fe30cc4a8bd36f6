"""File locks by which processes get the machine to themselves while they time a program.

The operating system releases a file lock when its holder ends, however it ends.
"""

from __future__ import annotations

from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, flock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["alone", "beside_others"]


def alone(file: Path) -> AbstractContextManager[None]:
    """Wait until nobody else holds the lock, and hold it exclusively.

    Args:
        file: lock file; created if it does not exist.
    """
    return _locked(file, LOCK_EX)


def beside_others(file: Path) -> AbstractContextManager[None]:
    """Wait until nobody holds the lock exclusively, and hold it shared.

    Args:
        file: lock file; created if it does not exist.
    """
    return _locked(file, LOCK_SH)


@contextmanager
def _locked(file: Path, kind: int) -> Generator[None]:
    with file.open("a") as held:
        flock(held, kind)
        yield

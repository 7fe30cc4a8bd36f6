"""Who may use the machine when a program is measured, by a lock on a file.

The system gives a lock on a file back when its holder ends, however it ends.
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
    """Wait until nobody else holds the lock, and keep all others out.

    Args:
        file: made if it is not there.
    """
    return _locked(file, LOCK_EX)


def beside_others(file: Path) -> AbstractContextManager[None]:
    """Wait until nobody is alone, and let nobody be alone.

    Args:
        file: made if it is not there.
    """
    return _locked(file, LOCK_SH)


@contextmanager
def _locked(file: Path, kind: int) -> Generator[None]:
    with file.open("a") as held:
        flock(held, kind)
        yield

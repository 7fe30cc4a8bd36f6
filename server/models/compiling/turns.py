"""Who may use the machine when a program is measured: pure bookkeeping by a lock on a file.

The system gives a lock on a file back when its holder ends, however it ends.
"""

from __future__ import annotations

from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, flock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

__all__ = ["alone", "beside_others"]


@contextmanager
def alone(file: Path) -> Generator[None]:
    """Wait until nobody else holds the lock, and keep all others out.

    Args:
        file: made if it is not there.
    """
    with file.open("a") as held:
        flock(held, LOCK_EX)
        yield


@contextmanager
def beside_others(file: Path) -> Generator[None]:
    """Wait until nobody is alone, and let nobody be alone.

    Args:
        file: made if it is not there.
    """
    with file.open("a") as held:
        flock(held, LOCK_SH)
        yield

"""Detection of opened files and folders below a path, by the kernel's notifications."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

__all__ = ["watched"]

IN_ACCESS: Final = 0x1
IN_OPEN: Final = 0x20
EVENT: Final = 16
"""Number of bytes of an event before its name; bytes 12 to 16 hold the name's length."""


@contextmanager
def watched(place: Path) -> Generator[Callable[[], set[str]]]:
    """Watch a folder and all folders in it.

    Yields:
        A function that returns the names of what was opened or read there since the last call, by
        any process; for a watched folder itself, the name is empty.

    Raises:
        OSError: the kernel allows no more watches.
    """
    kernel = ctypes.CDLL(None, use_errno=True)
    watch = kernel.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for folder, _, _ in os.walk(place):
            if kernel.inotify_add_watch(watch, os.fsencode(folder), IN_OPEN | IN_ACCESS) < 0:
                raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")
        # Walking a folder has opened it.
        _events(watch)
        yield lambda: _events(watch)
    finally:
        os.close(watch)


def _events(watch: int) -> set[str]:
    names: set[str] = set()
    while True:
        try:
            events = os.read(watch, 1 << 16)
        except BlockingIOError:
            return names
        at = 0
        while at < len(events):
            end = at + EVENT + int.from_bytes(events[at + 12 : at + EVENT], "little")
            names.add(os.fsdecode(events[at + EVENT : end].rstrip(b"\0")))
            at = end

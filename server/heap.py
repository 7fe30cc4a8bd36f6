"""The process's heap: the collector of reference cycles, and free memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["collect_all", "gc_frozen", "gc_paused", "return_free_memory"]


@contextmanager
def gc_paused() -> Generator[None]:
    """Pause the collector of reference cycles while many objects are created that stay alive.

    Importing torch or diffusers creates hundreds of thousands of objects, and the collector would
    traverse all of them again and again: a fifth of the time that the command line needs to start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def gc_frozen() -> Generator[None]:
    """Like :func:`gc_paused`, and exempt all objects that exist afterwards from collection.

    Use it only at the start of a process. Traversing the libraries and the models takes the
    collector some tenths of a second, during which neither the engine nor the event loop runs.
    Cycles that become unreachable later are left to :func:`collect_all`.
    """
    with gc_paused():
        yield
        gc.freeze()


def collect_all() -> None:
    """Free all unreachable cycles, including those among the exempt objects."""
    kept = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if kept:
        gc.freeze()


def return_free_memory() -> None:
    """Return memory that the allocator caches to the system.

    glibc caches blocks of up to 32 MB once some of that size were freed, so the memory of a flood
    of large bodies would stay with the process. Does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""The process's heap: the collector of reference cycles, and memory that is free."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["collect_all", "collection_paused", "kept_for_good", "return_free_memory"]


@contextmanager
def collection_paused() -> Generator[None]:
    """Keep the collector of reference cycles from running while much is made that stays.

    An import of torch or diffusers makes hundreds of thousands of objects, and the collector would
    go through all of them again and again: a fifth of the time that the command line needs to
    start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def kept_for_good() -> Generator[None]:
    """As :func:`collection_paused`, and the collector no longer looks at what there is afterwards.

    Only for the start of a process. Looking at the libraries and the models takes the collector
    some tenths of a second, in which neither the engine nor the event loop does anything. Cycles
    that become unreachable later are left to :func:`collect_all`.
    """
    with collection_paused():
        yield
        gc.freeze()


def collect_all() -> None:
    """Free all unreachable cycles, also those in what is kept for good."""
    kept = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if kept:
        gc.freeze()


def return_free_memory() -> None:
    """Give memory that the allocator keeps for later back to the system.

    glibc keeps blocks of up to 32 MB once some of that size were freed, so that what a flood of
    large bodies took would stay with the process. Does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

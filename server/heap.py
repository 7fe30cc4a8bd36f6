"""The process's heap."""

from __future__ import annotations

import ctypes

__all__ = ["return_free_memory"]


def return_free_memory() -> None:
    """Give memory that the allocator keeps for later back to the system.

    glibc keeps blocks of up to 32 MB once some of that size were freed, so that what a flood of
    large bodies took would stay with the process. Does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

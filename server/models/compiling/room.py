"""How many processes may compile at once: as many as leave the server its cores and memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from server.models.memory import HOST, measure

__all__ = ["cores", "has_room", "most_processes"]

MOST: Final = 8
"""A U-Net has some 22 shapes of blocks, and no other family more."""

CORES_EACH: Final = 2
"""One for the process, and one for the server and for the compilers that the process starts."""

HOST_BYTES: Final = 3 * 2**29
"""Of the host's memory for a process: without CUDA one has taken 0.4 GB."""

DEVICE_BYTES: Final = 2 * 2**30
"""Of a GPU's memory for a process: a CUDA context, and a block with what it computes."""

QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of processor time, or ``max``, in a period of so many."""


def most_processes() -> int:
    """Processes that may compile at once on this machine; at least one."""
    return max(1, min(MOST, cores() // CORES_EACH))


def cores() -> int:
    """Cores that this process may use, as its affinity and its container allow."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = map(int, QUOTA.read_text("ascii").split())
        allowed = min(allowed, max(1, quota // period))
    return allowed


def has_room(device: torch.device, others: int) -> bool:
    """Whether there is memory for one more process that compiles.

    Args:
        device: which it compiles for.
        others: that compile already. All of them count, as they may not have taken theirs yet.
    """
    count = others + 1
    host = measure(torch.device(HOST)).free >= count * HOST_BYTES
    return host and (device.type == HOST or measure(device).free >= count * DEVICE_BYTES)

"""How many processes may compile at once without taking the server's cores and memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from server.models.memory import HOST, measure

__all__ = ["cores", "has_room", "max_processes"]

MAX_PROCESSES: Final = 8
"""Maximum number of processes: a U-Net has some 22 shapes of blocks, and no other family more."""

CORES_EACH: Final = 2
"""Cores per process: one for it, and one for the server and the compilers that it starts."""

HOST_BYTES: Final = 3 * 2**29
"""Host memory reserved for each process: without CUDA, 0.4 GB was measured."""

DEVICE_BYTES: Final = 2 * 2**30
"""GPU memory for each process: a CUDA context, and a block with its activations."""

QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""CPU limit of a container: microseconds of CPU time (or ``max``) per period in microseconds."""


def max_processes() -> int:
    """Maximum number of processes that may compile at once on this machine; at least one."""
    return max(1, min(MAX_PROCESSES, cores() // CORES_EACH))


def cores() -> int:
    """Number of cores that this process may use, given its affinity and its container's limit."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = map(int, QUOTA.read_text("ascii").split())
        allowed = min(allowed, max(1, quota // period))
    return allowed


def has_room(device: torch.device, others: int) -> bool:
    """Whether there is enough memory for one more compiling process.

    Args:
        device: device for which it compiles.
        others: processes that compile already. Memory is counted for all of them, as they may not
            have allocated theirs yet.
    """
    count = others + 1
    host = measure(torch.device(HOST)).free >= count * HOST_BYTES
    return host and (device.type == HOST or measure(device).free >= count * DEVICE_BYTES)

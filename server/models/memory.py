"""Memory of a device as it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import psutil
import torch

from server.heap import collect_all

__all__ = [
    "HOST",
    "DeviceMemory",
    "attainable_bytes",
    "measure",
    "reclaim",
    "unused_bytes",
]

HOST: Final = "cpu"

ACTIVATIONS: Final = 0.1
"""Share of a GPU's memory that weights leave to activations, prompts and states."""

CGROUPS: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of a container, of both versions of control groups."""


class DeviceMemory(NamedTuple):
    """Bytes that weights may have: those that are free now, and all there are."""

    free: int
    most: int


def measure(device: torch.device) -> DeviceMemory:
    """What weights may have of a device's memory; on a CPU, of the machine's or the container's."""
    if device.type != "cuda":
        return _of_host()
    _, most = torch.cuda.mem_get_info(device)
    left_alone = int(ACTIVATIONS * most)
    return DeviceMemory(max(0, unused_bytes(device) - left_alone), most - left_alone)


def attainable_bytes(device: torch.device) -> int:
    """Bytes that weights may have of a device's memory once this process has unloaded its own."""
    free, most = measure(device)
    own = torch.cuda.memory_allocated(device) if device.type == "cuda" else most
    return min(free + own, most)


def unused_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that nothing uses; what torch keeps of freed tensors counts."""
    if device.type != "cuda":
        return _of_host().free
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def reclaim(device: torch.device) -> None:
    """Free what was let go of: networks with hooks refer to themselves."""
    collect_all()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # What streamed networks had locked of the host's memory, too.
        torch._C._host_emptyCache()  # pyright: ignore[reportPrivateUsage]


def _of_host() -> DeviceMemory:
    memory = psutil.virtual_memory()
    free, most = memory.available, memory.total
    for paths in CGROUPS:
        limit, used, statistics = (_read(path) for path in paths)
        # "max" is no limit.
        if limit.strip().isdigit() and used.strip().isdigit() and int(limit) < most:
            most = int(limit)
            free = min(free, most - int(used) + _of_files(statistics))
    return DeviceMemory(max(0, free), most)


def _of_files(statistics: str) -> int:
    """Bytes of files that the kernel keeps in memory as long as nobody else wants it.

    Files that are read twice, as those of models are, count as active, and are let go of as well.
    """
    values = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
    lists = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{name}", values.get(name, "0"))) for name in lists)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("ascii")
    except OSError:
        return ""

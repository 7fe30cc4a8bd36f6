"""Measures and reclaims the memory of devices."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import psutil
import torch

from server.errors import Overloaded
from server.heap import collect_all, return_free_memory

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = [
    "FULL_RETRY_S",
    "HOST",
    "DeviceMemory",
    "attainable_bytes",
    "check_memory_for",
    "measure",
    "reclaim",
    "refuse_if_out_of_memory",
    "unused_bytes",
]

HOST: Final = "cpu"

ACTIVATIONS: Final = 0.1
"""Fraction of a GPU's memory reserved for activations, prompts and states."""

NO_POOL: Final = 0, 0
"""The memory pool by which torch's snapshots name memory outside all pools of CUDA graphs."""

FULL_RETRY_S: Final = 5.0
"""Seconds after which weights that do not fit now may fit."""

GROUPS: Final = "/sys/fs/cgroup"
OWN_GROUP: Final = "/proc/self/cgroup"

USAGE: Final = "memory.max", "memory.current", "memory.stat"
USAGE_OF_VERSION_1: Final = tuple(
    f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")
)
"""Files with the limit, usage and statistics of a control group, such as a container's or a
service's."""


class DeviceMemory(NamedTuple):
    """Bytes available to weights: those free now, and the total."""

    free: int
    total: int


def measure(device: torch.device) -> DeviceMemory:
    """Memory available to weights on a device; for a CPU, that of the machine or the container."""
    if device.type != "cuda":
        return _of_host()
    _, total = torch.cuda.mem_get_info(device)
    left_alone = int(ACTIVATIONS * total)
    return DeviceMemory(max(0, unused_bytes(device) - left_alone), total - left_alone)


def attainable_bytes(device: torch.device) -> int:
    """Bytes available to weights on a device once this process has unloaded its own weights.

    CUDA graphs are released for weights that do not fit otherwise.
    """
    free, total = measure(device)
    if device.type != "cuda":
        return total
    used = torch.cuda.memory_reserved(device) - _cached_bytes(device)
    return min(free + used, total)


@contextmanager
def check_memory_for(called: str, needed: int, device: torch.device) -> Generator[None]:
    """Refuse weights that do not fit into the free memory of a device.

    They are loaded inside the ``with`` block, during which a tick of the engine may still allocate
    the memory that was free.

    Args:
        called: kind and name of the weights.
        needed: bytes needed.
        device: device on which they are needed.

    Raises:
        Overloaded: they do not fit now.
    """
    free = measure(device).free
    if needed > free:
        raise _no_room(called, needed, f"of which {free} are free")
    with refuse_if_out_of_memory(called, needed):
        yield


@contextmanager
def refuse_if_out_of_memory(called: str, needed: int) -> Generator[None]:
    """Refuse weights if loading them runs out of device memory.

    Args:
        called: kind and name of the weights.
        needed: bytes needed, for the error sentence.

    Raises:
        Overloaded: an allocation inside the ``with`` block failed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise _no_room(called, needed, "which are not free now") from None


def unused_bytes(device: torch.device) -> int:
    """Unused bytes of a device's memory, including those that torch caches from freed tensors.

    The memory pools of CUDA graphs are used as a whole, since only further graphs get memory there.
    """
    if device.type != "cuda":
        return _of_host().free
    free, _ = torch.cuda.mem_get_info(device)
    return free + _cached_bytes(device)


def reclaim(device: torch.device) -> None:
    """Free unreferenced memory; networks with hooks are reference cycles and need collection."""
    collect_all()
    # Weights on a CPU are in the allocator's heap, which keeps freed memory for this process.
    return_free_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # Includes host memory that streamed networks had pinned.
        torch._C._host_emptyCache()  # pyright: ignore[reportPrivateUsage]


def _cached_bytes(device: torch.device) -> int:
    """Bytes that torch caches from freed tensors, outside the memory pools of CUDA graphs."""
    index = cast("int | None", device.index)
    if index is None:
        index = torch.cuda.current_device()
    segments: Any = torch.cuda.memory_snapshot()
    return sum(
        one["total_size"] - one["allocated_size"]
        for one in segments
        if one["device"] == index and tuple(one["segment_pool_id"]) == NO_POOL
    )


def _no_room(called: str, needed: int, reason: str) -> Overloaded:
    return Overloaded(
        FULL_RETRY_S,
        f"{called} needs {needed} bytes of memory, {reason}; try again in {FULL_RETRY_S:.0f} s.",
    )


def _of_host() -> DeviceMemory:
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for folder, names in _control_groups():
        limit, used, statistics = (_read(folder / name) for name in names)
        # The limit "max" means none.
        if limit.strip().isdigit() and used.strip().isdigit():
            total = min(total, int(limit))
            # A larger limit of an outer group may be used up by the other groups in it.
            free = min(free, int(limit) - int(used) + _of_files(statistics))
    return DeviceMemory(max(0, free), total)


def _control_groups() -> list[tuple[Path, tuple[str, ...]]]:
    """Folders of the control groups of this process, with the names of their files.

    A container sees its own group as the outermost one; a service of systemd is nested further.
    """
    outermost = Path(GROUPS)
    lines = _read(Path(OWN_GROUP)).splitlines()
    own = [line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")]
    inner = outermost.joinpath(*own)
    found = [one for one in (inner, *inner.parents) if one.is_relative_to(outermost)]
    return [*((one, USAGE) for one in found), (outermost, USAGE_OF_VERSION_1)]


def _of_files(statistics: str) -> int:
    """Bytes of the page cache, which the kernel releases when memory is needed.

    Files that are read twice, such as those of models, count as active, and are released as well.
    """
    values = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
    lists = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{name}", values.get(name, "0"))) for name in lists)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""

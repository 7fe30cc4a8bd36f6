"""Memory of a device as it is now."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

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
    "measure",
    "reclaim",
    "refused_if_full",
    "room_for",
    "unused_bytes",
]

HOST: Final = "cpu"

ACTIVATIONS: Final = 0.1
"""Share of a GPU's memory that weights leave to activations, prompts and states."""

FULL_RETRY_S: Final = 5.0
"""After which weights may find room that do not now."""

GROUPS: Final = "/sys/fs/cgroup"
OWN_GROUP: Final = "/proc/self/cgroup"

USAGE: Final = "memory.max", "memory.current", "memory.stat"
USAGE_OF_VERSION_1: Final = tuple(
    f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")
)
"""Files with the limit, use and statistics of a control group, as of a container or a service."""


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


@contextmanager
def room_for(called: str, needed: int, device: torch.device) -> Generator[None]:
    """Refuse weights that do not fit in what is free of a device's memory.

    They are loaded inside the ``with`` block, where a tick may still take what was free.

    Args:
        called: what they are, with their name.
        needed: bytes.
        device: where they are needed.

    Raises:
        Overloaded: they do not fit now.
    """
    free = measure(device).free
    if needed > free:
        raise _no_room(called, needed, f"of which {free} are free")
    with refused_if_full(called, needed):
        yield


@contextmanager
def refused_if_full(called: str, needed: int) -> Generator[None]:
    """Refuse weights for which the device turns out to have no memory.

    Args:
        called: what they are, with their name.
        needed: bytes, for the refusal.

    Raises:
        Overloaded: there was no memory inside the ``with`` block.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise _no_room(called, needed, "which are not free now") from None


def unused_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that nothing uses; what torch keeps of freed tensors counts."""
    if device.type != "cuda":
        return _of_host().free
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def reclaim(device: torch.device) -> None:
    """Free what was let go of: networks with hooks refer to themselves."""
    collect_all()
    # Weights on a CPU are in the allocator's heap, and what it keeps is free to nobody else.
    return_free_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # What streamed networks had locked of the host's memory, too.
        torch._C._host_emptyCache()  # pyright: ignore[reportPrivateUsage]


def _no_room(called: str, needed: int, reason: str) -> Overloaded:
    return Overloaded(
        FULL_RETRY_S,
        f"{called} needs {needed} bytes of memory, {reason}; try again in {FULL_RETRY_S:.0f} s.",
    )


def _of_host() -> DeviceMemory:
    memory = psutil.virtual_memory()
    free, most = memory.available, memory.total
    for folder, names in _control_groups():
        limit, used, statistics = (_read(folder / name) for name in names)
        # "max" is no limit.
        if limit.strip().isdigit() and used.strip().isdigit() and int(limit) < most:
            most = int(limit)
            free = min(free, most - int(used) + _of_files(statistics))
    return DeviceMemory(max(0, free), most)


def _control_groups() -> list[tuple[Path, tuple[str, ...]]]:
    """Folders of the groups that this process is in, with the names of their files.

    A container sees its own group as the outermost one; a service of systemd is further inside.
    """
    outermost = Path(GROUPS)
    lines = _read(Path(OWN_GROUP)).splitlines()
    own = [line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")]
    inner = outermost.joinpath(*own)
    found = [one for one in (inner, *inner.parents) if one.is_relative_to(outermost)]
    return [*((one, USAGE) for one in found), (outermost, USAGE_OF_VERSION_1)]


def _of_files(statistics: str) -> int:
    """Bytes of files that the kernel keeps in memory as long as nobody else wants it.

    Files that are read twice, as those of models are, count as active, and are let go of as well.
    """
    values = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
    lists = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{name}", values.get(name, "0"))) for name in lists)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""

"""Memory of a device as it is now, and what a loaded model takes of it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from server.heap import collect_all

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel

__all__ = [
    "HOST",
    "DeviceMemory",
    "attainable_bytes",
    "bytes_of",
    "measure",
    "offloaded_bytes_of",
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


def bytes_of(model: HostedModel) -> int:
    """Bytes of a model's weights and buffers on its device; what is shared counts once."""
    return _bytes_on(model, model.device.type)


def offloaded_bytes_of(model: HostedModel) -> int:
    """Bytes of a model's weights that stay in host memory, though its device is another one."""
    return 0 if model.device.type == HOST else _bytes_on(model, HOST)


def _bytes_on(model: HostedModel, device: str) -> int:
    networks = list(model.modules().values())
    if model.classifier is not None:
        networks.append(model.classifier)
    own = chain.from_iterable(
        chain(network.parameters(), network.buffers()) for network in networks
    )
    held = [one for tensor in own for one in _held_by(tensor) if one.device.type == device]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in held}
    return sum(storage.nbytes() for storage in storages.values())


def _held_by(tensor: Tensor) -> list[Tensor]:
    """The tensors that have memory: of a quantised weight, its numbers and its scales."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [one for name in names for one in _held_by(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    return [tensor] if state is None else [tensor, *_scales_of(state)]


def _scales_of(state: Any) -> list[Tensor]:
    """What bitsandbytes keeps beside the numbers of a weight, and beside its scales in turn."""
    scales = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return scales if state.state2 is None else [*scales, *_scales_of(state.state2)]


def _of_host() -> DeviceMemory:
    memory = psutil.virtual_memory()
    free, most = memory.available, memory.total
    for paths in CGROUPS:
        limit, used, statistics = (_read(path) for path in paths)
        # "max" is no limit.
        if limit.strip().isdigit() and used.strip().isdigit() and int(limit) < most:
            most = int(limit)
            free = min(free, most - int(used) + _inactive(statistics))
    return DeviceMemory(max(0, free), most)


def _inactive(statistics: str) -> int:
    """Bytes of files that the kernel keeps in memory as long as nobody else wants it."""
    values = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _read(path: str) -> str:
    try:
        return Path(path).read_text("ascii")
    except OSError:
        return ""

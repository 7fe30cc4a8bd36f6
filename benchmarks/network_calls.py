"""The cost of one call of a network: its launch, its total time, and its longest operations."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import wait_for_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["NetworkCall", "call_costs", "wide_group_norm"]

TIMED = 5
NAMED = 4
"""Number of operations that are listed: those that take longest."""


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """A call of a network.

    Attributes:
        launch_s: median seconds until the host has launched it, which on a CPU is the whole call.
        done_s: median seconds until the device has finished it.
        longest: names of operations, with their seconds on the device in one call.
    """

    launch_s: float
    done_s: float
    longest: Sequence[tuple[str, float]]


def call_costs(call: Callable[[], object]) -> NetworkCall:
    """Time a call several times, and profile it once.

    Args:
        call: launches the work of one network.
    """
    launches: list[float] = []
    whole: list[float] = []
    for number in range(1 + TIMED):
        began = perf_counter()
        call()
        launched = perf_counter()
        wait_for_stream()
        if number:
            launches.append(launched - began)
            whole.append(perf_counter() - began)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as watched:
        call()
        wait_for_stream()
    operations: Any = watched.key_averages()
    on = "device" if torch.cuda.is_available() else "cpu"
    seconds = [
        (one.key, getattr(one, f"self_{on}_time_total") / 1e6)
        for one in operations
        if one.key.startswith("aten::")
    ]
    seconds.sort(key=lambda one: -one[1])
    return NetworkCall(median(launches), median(whole), seconds[:NAMED])


def wide_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``torch.nn.functional.group_norm`` with reductions that use the whole GPU.

    torch runs one block of threads for each group of a picture, and returns contiguous
    memory for any memory format. Here the format is kept, and rounding differs.

    Args:
        x: input ``[N, C, ...]``.
        groups: number of groups of channels.
        weight: weight ``[C]``; None for ones.
        bias: bias ``[C]``; None for zeros.
        eps: number added to the variance.
    """
    rows, channels = x.shape[:2]
    # Per channel first, since entries of a group are not adjacent in channels_last memory.
    variance, mean = torch.var_mean(x, dim=(*range(2, x.ndim),), correction=0)
    variance, mean = (one.float().view(rows, groups, -1) for one in (variance, mean))
    of_group = mean.mean(2, keepdim=True)
    spread = (variance + (mean - of_group).square()).mean(2, keepdim=True)
    scale = (spread + eps).rsqrt().expand_as(mean).reshape(rows, channels)
    scale = scale if weight is None else scale * weight
    shift = -of_group.expand_as(mean).reshape(rows, channels) * scale
    shift = shift if bias is None else shift + bias
    as_factor = rows, channels, *(1 for _ in x.shape[2:])
    shift, scale = (one.to(x.dtype).view(as_factor) for one in (shift, scale))
    return torch.addcmul(shift, x, scale)

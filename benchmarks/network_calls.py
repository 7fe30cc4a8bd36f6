"""What one call of a network costs: to launch it, until it is done, and by its operations."""

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
"""Operations that are named, those that take longest."""


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """A call of a network.

    Attributes:
        launch_s: median seconds until the host has launched it, which on a CPU is all of it.
        done_s: median seconds until the device has done it.
        longest: names of operations with the seconds that they take of the device in one call.
    """

    launch_s: float
    done_s: float
    longest: Sequence[tuple[str, float]]


def call_costs(call: Callable[[], object]) -> NetworkCall:
    """Time a call, and profile it once.

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
    """``torch.nn.functional.group_norm`` in reductions that all of a GPU takes part in.

    torch has one block of threads for each group of a picture, and returns contiguous
    memory whatever it is given. Here the format stays, and rounding differs.

    Args:
        x: ``[N, C, ...]``.
        groups: of channels.
        weight: ``[C]``; None for ones.
        bias: ``[C]``; None for zeros.
        eps: added to the variance.
    """
    rows, channels = x.shape[:2]
    # Of a channel first, as a group's entries do not lie side by side in channels_last.
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

"""Measurement of the time that a block of code takes on the device."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from types import TracebackType


class Stopwatch:
    """Wall time on a CPU, event time on CUDA, where wall time measures only the launches."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            if device.type == "cuda"
            else None
        )
        self._began = 0.0
        self._ended = 0.0

    def __enter__(self) -> Self:
        if self._events:
            self._events[0].record()
        self._began = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Seconds of the block; on CUDA valid only after a later wait for the device."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._ended - self._began

"""A GPU's streams, captures and workspaces, simulated as torch 2.13 treats them.

Where a rule is not obvious, the place in torch's sources is named.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


class Stream:
    """A stream; its tensors are on the CPU."""

    device = CPU
    device_index = 0

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    """A graph of the simulated GPU.

    Args:
        of: the GPU.
    """

    def __init__(self, of: SimulatedCuda) -> None:
        self._of = of
        self._pool: object = None
        self._stream: Stream | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """See ``CUDAGraph::capture_begin``."""
        assert capture_error_mode == "thread_local"
        self._pool, self._stream = pool or object(), self._of.current
        self._of.graphs_of[self._pool] = self._of.graphs_of.get(self._pool, 0) + 1
        self._of.recorded_to.append(self._pool)
        # CachingHostAllocatorImpl::begin_allocate_to_pool
        if self._pool in self._of.pinned_recorded_to:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._of.pinned_recorded_to.append(self._pool)
        self._of.capturing.append(self)

    def capture_end(self) -> None:
        """See ``CUDAGraph::capture_end``, which returns early from a capture that failed."""
        self._of.capturing.remove(self)
        if self._of.invalidated:
            self._of.invalidated = False
            self._stream = None
            raise RuntimeError("operation failed due to a previous error during capture")
        self._of.recorded_to.remove(self._pool)
        self._of.pinned_recorded_to.remove(self._pool)

    def reset(self) -> None:
        """See ``CUDAGraph::reset``, which frees the workspaces of the stream."""
        if self._stream is not None:
            self._of.workspaces.pop(self._stream, None)
            self._of.released(self._pool)
            self._stream = None


class SimulatedCuda:
    """The GPU; it replaces functions of ``torch.cuda``.

    Attributes:
        current: current stream of the only thread.
        workspaces: for each stream, the pool in which its workspace was allocated; None for none.
        recorded_to: pools to which the allocator believes that a capture is recording.
        pinned_recorded_to: the same of the allocator of pinned memory.
        graphs_of: number of graphs of each pool.
        invalidated: whether the capture under way has failed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = Stream()
        self.workspaces: dict[Stream, object] = {}
        self.recorded_to: list[object] = []
        self.pinned_recorded_to: list[object] = []
        self.graphs_of: dict[object, int] = {}
        self.capturing: list[Graph] = []
        self.invalidated = False
        replaced: dict[str, Any] = {
            "CUDAGraph": lambda: Graph(self),
            "Stream": Stream,
            "stream": self._on,
            "graph": self._recorded,
            "graph_pool_handle": object,
            "current_stream": lambda _: self.current,
        }
        bytes_of = ("memory_allocated", "max_memory_allocated", "memory_reserved")
        replaced |= dict.fromkeys(bytes_of, lambda _: 0)
        replaced |= dict.fromkeys(("synchronize", "empty_cache"), lambda *_: None)
        replaced["reset_peak_memory_stats"] = lambda _: None
        for name, by in replaced.items():
            monkeypatch.setattr(torch.cuda, name, by)
        own = {"_cuda_endAllocateToPool": self._end, "_cuda_releasePool": self._release}
        for name, by in own.items():
            monkeypatch.setattr(torch._C, name, by, raising=False)

    def multiply(self) -> object:
        """A matrix product on the current stream; returns the pool of the workspace it used."""
        pool = self.capturing[-1]._pool if self.capturing else None
        return self.workspaces.setdefault(self.current, pool)

    def synchronize(self) -> None:
        """A wait for the device, which a capture does not allow."""
        if self.capturing:
            self.invalidated = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def released(self, pool: object) -> None:
        """Count one graph of a pool less."""
        self.graphs_of[pool] -= 1

    @contextmanager
    def _on(self, stream: Stream) -> Generator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _recorded(
        self, graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str
    ) -> Generator[None]:
        """See ``torch.cuda.graph``, whose last line is skipped where one before it raises."""
        before, self.current = self.current, stream
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()
            self.current = before

    def _end(self, device: int, pool: object) -> None:
        if pool not in self.recorded_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recorded_to.remove(pool)

    def _release(self, device: int, pool: object) -> None:
        self.released(pool)

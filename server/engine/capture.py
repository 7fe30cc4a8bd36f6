"""CUDA graph capture of forward passes, in memory that the graphs of a model share."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from server.engine.constants import Constants
from server.models.memory import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["CapturedForward", "CudaRecorder"]

SHARE = 0.125
"""Maximum fraction of a GPU's memory for the graphs of one model."""

ALONE = RLock()
"""Held while a thread captures, prepares a capture, or waits for the whole device.

A wait for the whole device is an error in the thread that captures, too, and captures that are
replayed on one stream share the stream on which they are made. An engine has one thread for this,
but a process may have several engines.
"""


class CudaRecorder:
    """Records forward passes of one model as CUDA graphs, which never run at the same time.

    Args:
        device: device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._pool_bytes = 0
        self._closed_bytes = 0
        self._made: list[CapturedForward] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the graphs hold."""
        pools = self._pool_bytes + self._closed_bytes
        return pools + sum(one.input_bytes for one in list(self._made))

    def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
        """Run a forward pass to measure its memory; return whether there is room for a graph of it.

        Of the free memory, graphs may take no more than ``room`` in addition to what they hold.

        The pass runs on the stream of the graphs, so that libraries create there, before capture,
        what they create once per stream and what must not be part of a graph.
        """
        with ALONE:
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            here = torch.cuda.current_stream(self._device)
            stream = _stream(here)
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                forward()
            here.wait_stream(stream)
            torch.cuda.synchronize(self._device)
            needed = torch.cuda.max_memory_allocated(self._device) - before
            torch.cuda.empty_cache()
        free, total = measure(self._device)
        return needed <= SHARE * total and needed - self._pool_bytes <= min(free, room)

    def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> CapturedForward:
        """Record a forward pass.

        Args:
            evaluate: function of the tensors; it must have run before with these shapes, see
                :meth:`fits`.
            given: tensors of the shapes to record.
        """
        with ALONE:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # The inputs of a released graph are freed; its part of the pool serves the next graph.
            self._made = [one for one in self._made if one.input_bytes]
            copies = [one.clone() for one in given]
            stream = _stream(torch.cuda.current_stream(self._device))
            _free_workspaces(stream)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            try:
                made = CapturedForward(evaluate, copies, self._pool, stream)
            except BaseException:
                self._close_pool()
                raise
            self._pool_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
            self._made.append(made)
            return made

    def reset_pool(self) -> None:
        """Use a new pool from now on; one whose graphs are all gone cannot be used again."""
        self._pool, self._pool_bytes, self._closed_bytes, self._made = None, 0, 0, []

    def _close_pool(self) -> None:
        """Leave the pool to the graphs that it has, and use a new one from now on.

        After a failed capture, torch's allocator of pinned memory takes the pool for one that is
        still being recorded to, and would refuse every further capture.
        """
        self._pool, self._closed_bytes = None, self._closed_bytes + self._pool_bytes
        self._pool_bytes = 0


class CapturedForward:
    """A recorded forward pass: inputs are copied to fixed memory, and its graph is replayed.

    Args:
        evaluate: function of the tensors.
        given: tensors of the shapes to record, which it keeps and writes to.
        pool: memory pool shared with graphs that never run at the same time.
        stream: stream on which to capture; a failed capture leaves it in order.
    """

    def __init__(
        self,
        evaluate: Callable[..., Tensor],
        given: Sequence[Tensor],
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        self._inputs = [*given]
        self._graph = torch.cuda.CUDAGraph()
        constants = Constants()
        failed: BaseException | None = None
        try:
            # Operations that cannot be captured are forbidden in this thread only: another thread
            # may load an adapter meanwhile. The outer context brings back the current stream where
            # ending the capture fails, which the inner one does not.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    with constants:
                        self._raw = evaluate(*self._inputs)
                except BaseException as error:
                    failed = error
                    raise
            self._constants = constants.tensors
        except BaseException:
            # If the capture was not ended, the allocator would wait for its end forever, and free
            # neither memory that two streams have used, nor the pool.
            with suppress(RuntimeError):
                of_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage]
                of_torch._cuda_endAllocateToPool(stream.device_index, pool)
                of_torch._cuda_releasePool(stream.device_index, pool)
            if failed is not None:
                # Not that the capture could not be ended, which may follow from a lack of memory.
                raise failed from failed.__cause__
            raise
        finally:
            # The error's traceback holds this frame, with the tensors that there was no room for.
            failed = None

    @property
    def input_bytes(self) -> int:
        """Bytes of its input tensors, which lie outside the pool."""
        return sum(one.nbytes for one in self._inputs)

    def __call__(self, *given: Tensor) -> Tensor:
        """Replay the pass for other tensors of the same shapes, on the current stream."""
        for mine, theirs in zip(self._inputs, given, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        # A copy: the next graph to run may overwrite the original.
        return self._raw.clone()

    def release(self) -> None:
        """Free its memory; it can no longer be called."""
        with ALONE:
            torch.cuda.synchronize()
            self._graph.reset()
        self._inputs = []
        del self._raw, self._constants


def _free_workspaces(stream: torch.cuda.Stream) -> None:
    """Free what cuBLAS keeps for a stream on which forward passes are recorded, and for no other.

    cuBLAS has one workspace for each thread and stream, and a graph contains the address of the one
    that existed when it was recorded. torch 2.13 frees those of a stream as soon as any graph that
    was captured on it is reset, so that a replay of another graph would write to freed memory. A
    workspace allocated during the recording lies in the graphs' pool, which lives as long as they
    do. Older versions keep all workspaces for good, and graphs may use them.

    Resetting a graph frees them; torch's own function would free those of all threads, one of which
    may be about to launch a product that uses one.
    """
    graph, nothing = torch.cuda.CUDAGraph(), torch.zeros(1, device=stream.device)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        nothing.zero_()
        graph.capture_end()
    graph.reset()


@cache
def _stream(replayed_on: torch.cuda.Stream) -> torch.cuda.Stream:
    """One stream for all recordings replayed on a stream, since libraries allocate per stream.

    Recordings replayed on another stream may run at the same time and must not share that memory:
    cuBLAS has one workspace per stream, which recordings keep using.
    """
    return torch.cuda.Stream(replayed_on.device)

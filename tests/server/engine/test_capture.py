"""Recordings of forward passes and the memory that they hold, on a simulated device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from math import inf
from threading import Semaphore
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import capture
from server.engine.capture import CudaRecorder
from tests.server.engine.simulated_cuda import CPU, SimulatedCuda

POOL = 1 << 20
"""Bytes of the pool, all of which the first recording takes and the others reuse."""


class Graph:
    """Keeps nothing."""

    def reset(self) -> None: ...


def test_what_recordings_hold_does_not_grow_as_others_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, pooled = torch.zeros(7, 1 << 16), list[int]()

    def reserved(_: Any) -> int:
        here = (one for one in gc.get_objects() if type(one) is Tensor and one is not given)
        return sum(pooled) + sum(one.nbytes for one in here if one.shape == given.shape)

    def forward(x: Tensor) -> Tensor:
        pooled[:] = [POOL]
        return x.sum()

    replaced = {
        "CUDAGraph": Graph,
        "graph": lambda *_, **__: nullcontext(),
        "graph_pool_handle": object,
        "memory_reserved": reserved,
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "current_stream": lambda _: None,
    }
    for name, by in replaced.items():
        monkeypatch.setattr(torch.cuda, name, by)
    monkeypatch.setattr(capture, "_free_workspaces", lambda _: None)
    monkeypatch.setattr(capture, "_stream", lambda _: None)
    recorder = CudaRecorder(torch.device("cpu"))
    kept = recorder.record(forward, [given])
    assert recorder.nbytes == POOL + given.nbytes
    for _ in range(3):
        passing = recorder.record(forward, [given])
        assert recorder.nbytes == POOL + 2 * given.nbytes
        passing.release()
        assert recorder.nbytes == POOL + given.nbytes
    kept.release()
    recorder.reset_pool()
    assert recorder.nbytes == 0


def test_a_recording_uses_a_workspace_in_its_own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from before would be freed with the first recording released, which others outlive."""
    gpu = SimulatedCuda(monkeypatch)
    used = list[object]()

    def forward(x: Tensor) -> Tensor:
        used.append(gpu.multiply())
        return x

    for recorder in (CudaRecorder(CPU), CudaRecorder(CPU)):
        with torch.cuda.stream(capture._stream(gpu.current)):  # type: ignore[arg-type]
            assert gpu.multiply() is None
        made = [recorder.record(forward, [torch.zeros(2)]) for _ in range(2)]
        assert used[-2:] == [recorder._pool] * 2
        made[0].release()


def test_a_recording_leaves_the_workspaces_of_other_streams_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may be about to launch a product that uses its own."""
    gpu = SimulatedCuda(monkeypatch)
    gpu.multiply()
    here = gpu.current
    recorder = CudaRecorder(CPU)
    recorder.record(torch.neg, [torch.zeros(2)]).release()
    recorder.reset_pool()
    assert list(gpu.workspaces) == [here]


def test_two_engines_of_a_process_capture_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They share the stream, and a wait for the device would be an error in both threads."""
    SimulatedCuda(monkeypatch)
    inside, most = Semaphore(1), list[bool]()

    def forward(x: Tensor) -> Tensor:
        alone = inside.acquire(blocking=False)
        most.append(alone)
        sleep(0.02)
        if alone:
            inside.release()
        return x

    def work(recorder: CudaRecorder) -> None:
        for _ in range(3):
            recorder.fits(lambda: forward(torch.zeros(2)), inf)
            recorder.record(forward, [torch.zeros(2)]).release()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, (CudaRecorder(CPU), CudaRecorder(CPU))))
    assert most == [True] * 12


def failing(gpu: SimulatedCuda) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gpu.synchronize()
        return x

    return forward


def test_a_failed_capture_leaves_the_thread_on_the_stream_that_it_was_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ticks would go on beside work of the stream before, without waiting for it."""
    gpu = SimulatedCuda(monkeypatch)
    before = gpu.current
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(CPU).record(failing(gpu), [torch.zeros(2)])
    assert gpu.current is before


def test_a_failed_capture_says_why_and_not_only_that_it_could_not_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For lack of memory recordings rest for a while; other failures are final."""
    gpu = SimulatedCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        CudaRecorder(CPU).record(failing(gpu), [torch.zeros(2)])


def test_after_a_failed_capture_others_succeed_and_memory_can_be_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimulatedCuda(monkeypatch)
    recorder = CudaRecorder(CPU)
    made = [recorder.record(torch.neg, [torch.zeros(2)])]
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(failing(gpu), [torch.zeros(2)])
    assert gpu.recorded_to == []
    made.append(recorder.record(torch.neg, [torch.zeros(2)]))
    for one in made:
        one.release()
    assert set(gpu.graphs_of.values()) == {0}


def test_recordings_that_may_be_replayed_at_once_are_made_on_streams_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recordings of one stream share what libraries keep for that stream."""

    class Stream:
        def __init__(self, device: str = "here") -> None:
            self.device = device

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    ticks, decoder = Stream(), Stream()
    made = [capture._stream(one) for one in (ticks, decoder, ticks, decoder)]  # type: ignore[arg-type]
    assert made[0] is made[2]
    assert made[1] is made[3]
    assert len({*made, ticks, decoder}) == 4

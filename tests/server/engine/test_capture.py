"""The memory that recordings of a model are reported to hold, on a simulated device."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import capture
from server.engine.capture import CudaRecorder

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
    monkeypatch.setattr(capture, "_drop_workspaces", lambda: None)
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
    recorder.begin_anew()
    assert recorder.nbytes == 0


def test_a_recording_uses_no_workspace_that_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be freed with the first recording released, while the others still use it."""
    told = list[str]()

    def graph(*_: Any, **__: Any) -> nullcontext[None]:
        told.append("recorded")
        return nullcontext()

    replaced = {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": object,
        "memory_reserved": lambda _: 0,
        "empty_cache": lambda: None,
        "current_stream": lambda _: None,
    }
    for name, by in replaced.items():
        monkeypatch.setattr(torch.cuda, name, by)
    monkeypatch.setattr(capture, "_stream", lambda _: None)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: told.append("dropped"), raising=False
    )
    recorder = CudaRecorder(torch.device("cpu"))
    for _ in range(2):
        recorder.record(torch.sum, [torch.zeros(2)])
    assert told == ["dropped", "recorded"] * 2


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

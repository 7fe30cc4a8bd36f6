"""Compared systems do not disturb each other on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from benchmarks.peers import Clock


@pytest.mark.cuda
def test_a_network_is_timed_while_another_thread_records_a_graph() -> None:
    """Synchronizing with the whole device would be an error in both threads."""
    layer, x = nn.Linear(8, 8, device="cuda"), torch.ones(1, 8, device="cuda")
    expected = layer(x).detach()
    recording, timed = Event(), Event()
    graph, stream, y = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.ones(4, device="cuda")

    def record() -> None:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            y.mul_(2)
            recording.set()
            timed.wait(30)

    clock = Clock(layer)
    with ThreadPoolExecutor(1) as threads:
        recorded = threads.submit(record)
        assert recording.wait(30)
        try:
            assert torch.equal(layer(x), expected)
        finally:
            timed.set()
        recorded.result()
    assert clock.stop() > 0
    graph.replay()
    assert y.tolist() == [2.0] * 4


@pytest.mark.cuda
def test_a_network_of_which_a_graph_is_recorded_may_have_a_clock() -> None:
    layer, x = nn.Linear(8, 8, device="cuda"), torch.ones(1, 8, device="cuda")
    expected = layer(x).detach()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    clock, graph = Clock(layer), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        made = layer(x)
    graph.replay()
    clock.stop()
    assert torch.equal(made, expected)

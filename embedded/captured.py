"""A training step as a CUDA graph, since launching the kernels of small networks costs most."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_WARM_UP: Final = 5
"""Steps before the capture, which must not meet anything that is set up on first use."""


def captured(step: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The same step, replayed from a graph on CUDA; elsewhere the step itself.

    The step reads and writes the same tensors every time, and never waits for the device. What it
    returns is overwritten by the next call. On CUDA the first few steps are made here.
    """
    if torch.device(device).type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay

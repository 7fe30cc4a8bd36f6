"""Training steps as CUDA graphs, since kernel launches dominate the cost of small networks."""

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor, nn

_WARM_UP: Final = 5
"""Number of steps before the capture, which must not include anything set up on first use."""


def captured(step: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The same step, replayed from a graph on CUDA; on other devices the step itself.

    The step must read and write the same tensors every time, and must not synchronize with the
    device. Its result is overwritten by the next call. On CUDA the first few steps run here.
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


def adam(
    parameters: Iterable[nn.Parameter], rate: float, betas: tuple[float, float], device: str
) -> torch.optim.AdamW:
    """Adam without weight decay; its learning rate is a tensor that a captured step reads."""
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(rate, device=device),
        betas=betas,
        weight_decay=0.0,
        fused=True,
        capturable=torch.device(device).type == "cuda",
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of an optimizer made by :func:`adam`."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)

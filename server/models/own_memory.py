"""Copies weights to memory of their own, so that they are not maps of their files.

Loading a safetensors file maps it into memory, and on a CPU a weight of the file's dtype would
remain such a map: if the file were overwritten in place, images would change, and if it were
truncated, SIGBUS would end the process.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from server.models.memory import HOST

if TYPE_CHECKING:
    import torch

__all__ = ["copy_to_own_memory"]


def copy_to_own_memory(network: nn.Module, device: torch.device) -> None:
    """Copy a network's weights in place, unless they will be copied to another device anyway.

    They are copied one after another, so that at most one of them is in memory twice.

    Args:
        network: network in host memory.
        device: device on which it will run.
    """
    if device.type != HOST:
        return
    for tensor in chain(network.parameters(), network.buffers()):
        # Quantized weights are results of computations, hence copies already.
        if type(tensor) in (Tensor, nn.Parameter):
            tensor.data = tensor.data.clone()

"""Weights in memory of their own instead of in maps of their files.

A file of safetensors is mapped into memory to be loaded, and on a CPU a weight of the file's type
would stay such a map: a file that is overwritten in place would change pictures, and one that is
cut short would end the process with SIGBUS.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from server.models.memory import HOST

if TYPE_CHECKING:
    import torch

__all__ = ["give_own_memory"]


def give_own_memory(network: nn.Module, device: torch.device) -> None:
    """Copy the weights of a network in place, where they are not copied to its device anyway.

    One after another, so that no more than one of them is in memory twice.

    Args:
        network: in host memory.
        device: where it is to run.
    """
    if device.type != HOST:
        return
    for tensor in chain(network.parameters(), network.buffers()):
        # Quantised weights were computed, which is a copy.
        if type(tensor) in (Tensor, nn.Parameter):
            tensor.data = tensor.data.clone()

"""Moves the networks of a model to where they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from server.models.own_memory import copy_to_own_memory
from server.models.quantized import quantize
from server.models.streamed import stream_blocks

if TYPE_CHECKING:
    from server.models.hosted import HostedModel
    from server.models.placement import Placement

__all__ = ["move_to_device"]

HOST: Final = torch.device("cpu")


def move_to_device(model: HostedModel, placement: Placement) -> None:
    """Move the networks of a model to its device.

    Args:
        model: model whose networks are in host memory.
        placement: how they should be kept.
    """
    for part, network in model.modules().items():
        streamed = placement.streams(part)
        if placement.quantizes(part):
            home = HOST if streamed else model.device
            quantize(network, placement.quantization, model.device, home)
        if streamed:
            stream_blocks(network, model.device)
        else:
            network.to(model.device)
            copy_to_own_memory(network, model.device)
    model.placement = placement

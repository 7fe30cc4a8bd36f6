"""Networks whose blocks stay in host memory, and are on the device only while they run.

By the group offloading of diffusers: while a block runs, the next one is copied on a stream of its
own. A network then takes as much of the device as its two largest blocks and what stands outside of
them, and a forward takes at least as long as copying it. Weights do not change, so nothing is
written back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from torch import nn

if TYPE_CHECKING:
    import torch

__all__ = ["STREAMED_BLOCKS", "is_streamed", "stream_blocks"]

GROUPS: Final = "group_offloading"
"""Name of the hook by which diffusers moves a module."""

STREAMED_BLOCKS: Final = 2
"""Blocks of a network that are on the device at once: one that runs, and the next."""


def stream_blocks(network: nn.Module, device: torch.device) -> None:
    """Stream the blocks of a network from host memory; the rest of it is moved to the device.

    Args:
        network: of diffusers or transformers, in inference mode, called by its forward.
        device: where it runs.
    """
    from diffusers.hooks import apply_group_offloading

    trunk = _trunk(network)
    _move_all_but(trunk, network, device)
    apply_group_offloading(
        trunk,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )


def is_streamed(network: nn.Module) -> bool:
    """Whether a network's weights move while it runs."""
    registries: list[Any] = [
        found
        for module in network.modules()
        if (found := getattr(module, "_diffusers_hook", None)) is not None
    ]
    return any(one.get_hook(GROUPS) is not None for one in registries)


def _trunk(network: nn.Module) -> nn.Module:
    """The outermost module that has lists of blocks, which diffusers takes for its groups."""
    waiting = deque([network])
    while waiting:
        module = waiting.popleft()
        children = list(module.children())
        if any(isinstance(child, nn.ModuleList) for child in children):
            return module
        waiting.extend(children)
    return network


def _move_all_but(trunk: nn.Module, module: nn.Module, device: torch.device) -> None:
    if module is trunk:
        return
    if all(inner is not trunk for inner in module.modules()):
        module.to(device)
        return
    for child in module.children():
        _move_all_but(trunk, child, device)

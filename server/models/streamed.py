"""Networks whose blocks stay in host memory and are on the device only while they run.

This uses diffusers' group offloading: while a block runs, the next one is copied on a separate
stream. A network then takes as much device memory as its two largest blocks and its parts outside
the blocks, and a forward pass takes at least as long as copying the network. Weights do not change,
so nothing is copied back.
"""

from __future__ import annotations

from collections import deque
from copy import copy
from typing import TYPE_CHECKING, Any, Final

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

__all__ = ["STREAMED_BLOCKS", "at_rest", "stream_blocks"]

GROUPS: Final = "group_offloading"
"""Name of the hook by which diffusers moves a module."""

STREAMED_BLOCKS: Final = 2
"""Number of a network's blocks that are on the device at once: the running one, and the next."""


def stream_blocks(network: nn.Module, device: torch.device) -> None:
    """Stream the blocks of a network from host memory; the rest of it is moved to the device.

    Args:
        network: network of diffusers or transformers, in inference mode, called by its ``forward``.
        device: device on which it runs.
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


def at_rest(network: nn.Module, name: str, device: torch.device) -> Any:
    """A layer, or a copy of it that is not moved if its weight is streamed.

    Args:
        network: network that contains it, and may run at the same time.
        name: name of the layer, which must not contain other layers.
        device: device for the copy's parameters.
    """
    layer = network.get_submodule(name)
    host = next((own for own in _host_tensors(network) if layer.weight in own), None)
    if host is None:
        return layer
    still = copy(layer)
    vars(still)["_parameters"] = {
        name: None if one is None else nn.Parameter(host[one].to(device), requires_grad=False)
        for name, one in vars(layer)["_parameters"].items()
    }
    # The layer's own ``forward`` attribute is the hook that moves it.
    vars(still).pop("forward", None)
    return still


def _host_tensors(network: nn.Module) -> Iterator[Mapping[Any, Tensor]]:
    """The host copies of the parameters and buffers of each group of blocks.

    They do not change while the network runs.
    """
    for module in network.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(GROUPS)
        if hook is not None:
            yield hook.group.cpu_param_dict


def _trunk(network: nn.Module) -> nn.Module:
    """The outermost module that has lists of blocks, from which diffusers makes its groups."""
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

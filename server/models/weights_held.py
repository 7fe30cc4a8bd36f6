"""Memory used by a loaded model."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from server.models.memory import HOST

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel

__all__ = ["bytes_of", "offloaded_bytes_of"]


def bytes_of(model: HostedModel) -> int:
    """Bytes of a model's weights and buffers on its device; shared storage counts once."""
    return _bytes_on(model, model.device.type)


def offloaded_bytes_of(model: HostedModel) -> int:
    """Bytes of a model's weights that stay in host memory although it runs on another device."""
    return 0 if model.device.type == HOST else _bytes_on(model, HOST)


def _bytes_on(model: HostedModel, device: str) -> int:
    networks = list(model.modules().values())
    if model.tiny is not None:
        networks.append(model.tiny.network)
    if model.classifier is not None:
        networks.append(model.classifier)
    own = chain.from_iterable(
        chain(network.parameters(), network.buffers()) for network in networks
    )
    held = [one for tensor in own for one in _held_by(tensor) if one.device.type == device]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in held}
    return sum(storage.nbytes() for storage in storages.values())


def _held_by(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold memory: for a quantized weight, its numbers and its scales."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [one for name in names for one in _held_by(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    return [tensor] if state is None else [tensor, *_scales_of(state)]


def _scales_of(state: Any) -> list[Tensor]:
    """Tensors that bitsandbytes keeps in addition to a weight's numbers, nested scales included."""
    scales = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return scales if state.state2 is None else [*scales, *_scales_of(state.state2)]

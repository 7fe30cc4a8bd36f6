"""A block of a network without weights and hooks, to be compiled in another process."""

from __future__ import annotations

from copy import deepcopy
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["fingerprint", "skeleton_of", "weights_of"]

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def weights_of(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in an order that depends only on the class and its config."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def skeleton_of(block: nn.Module) -> nn.Module:
    """Copy a block, with weights on the meta device and its class's own ``forward``."""
    hollow = {id(one): _hollow(one) for one in weights_of(block).values()}
    made = deepcopy(block, hollow)
    for module in made.modules():
        for hooks in HOOKS:
            getattr(module, hooks).clear()
        vars(module).pop("forward", None)
    return made


def fingerprint(skeleton: nn.Module) -> str:
    """Hash that is equal for blocks that compute the same from weights of the same shapes."""
    own = [
        (name, type(one).__module__, type(one).__qualname__, _settings(vars(one)))
        for name, one in skeleton.named_modules()
    ]
    weights = [
        (name, tuple(one.shape), one.stride(), str(one.dtype))
        for name, one in weights_of(skeleton).items()
    ]
    return sha256(repr((own, weights)).encode()).hexdigest()


def _settings(attributes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A module's own attributes: plain values by ``repr``, all others by their class."""
    own = {name: one for name, one in attributes.items() if name not in vars(nn.Module())}
    return [
        (name, repr(value) if _plain(value) else type(value).__qualname__)
        for name, value in sorted(own.items())
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))  # pyright: ignore[reportUnknownArgumentType]
    return value is None or isinstance(value, bool | int | float | str)


def _hollow(weight: Tensor) -> Tensor:
    made = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(weight, nn.Parameter) else made

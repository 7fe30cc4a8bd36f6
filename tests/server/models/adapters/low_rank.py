"""Random adapters, and a network with adapters merged into its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from server.models.adapters.adapter import Adapter, LowRank, Weighted
from server.models.adapters.norms import NormChange, is_norm

Network = TypeVar("Network", bound=nn.Module)


def changes(
    network: nn.Module, rank: int, seed: int = 0, size: float = 0.3, within: str = ""
) -> dict[str, LowRank]:
    """Random changes of the linear layers and convolutions in whose names ``within`` matches.

    Convolutions in groups are left out, since no adapter changes them.
    """
    generator = torch.Generator().manual_seed(seed)
    like = next(network.parameters())

    def drawn(*shape: int) -> Tensor:
        return (size * torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(like)

    made: dict[str, LowRank] = {}
    for name, layer in network.named_modules():
        if not re.search(within, name):
            continue
        if isinstance(layer, nn.Linear):
            made[name] = LowRank(drawn(rank, layer.in_features), drawn(layer.out_features, rank))
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            down = drawn(rank, layer.in_channels, *layer.kernel_size)
            made[name] = LowRank(down, drawn(layer.out_channels, rank))
    return made


def norm_changes(network: nn.Module, seed: int = 0, size: float = 0.3) -> dict[str, NormChange]:
    """Random changes of all norms."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, NormChange] = {}
    for name, norm in network.named_modules():
        if is_norm(norm):
            both = size * torch.randn(2, len(norm.weight), generator=generator)
            made[name] = NormChange(*both.to(norm.weight.device))
    return made


def adapter(name: str, parts: Mapping[str, Mapping[str, LowRank]]) -> Adapter:
    return Adapter(name, f"revision of {name}", parts)


def merged(network: Network, part: str, adapters: Sequence[Weighted]) -> Network:
    """The network as other programs adapt it, by merging the changes into its weights."""
    changed = copy.deepcopy(network)
    for one in adapters:
        for name, change in one.adapter.parts.get(part, {}).items():
            weight = changed.get_submodule(name).get_parameter("weight")
            product = torch.einsum("or,r...->o...", change.up, change.down)
            weight.data += one.weight * product
    return changed

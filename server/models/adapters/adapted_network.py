"""Adapters of some rows of a forward, while the other rows pass the network as it is.

Nothing is merged into the weights: after a layer has put out all rows, the changes of the rows that
have adapters are added to theirs. Rows of different adapters share the matrix products: one batch
of matrices for all rows whose changes have the same rank. The other rows stay as they are, to the
bit.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from server.models.adapters.convolution import convolve_by_products, multiplies

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor

    from server.models.adapters.adapter import LowRank, RowAdapters

__all__ = ["AdaptedNetwork"]

Value = TypeVar("Value")
Layer: TypeAlias = "nn.Linear | nn.Conv2d"
Hook: TypeAlias = "Callable[[Layer, tuple[Tensor, ...], Tensor], Tensor]"


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Some rows of the forward, and the weight of the adapter that each of them has.

    Attributes:
        positions: of the rows, padding not counted.
        all: whether they are all rows of the forward, which need no gathering.
        where: the positions, int64 on the device; padded with the first one.
        weights: float32 ``[rows, 1, 1]``, padded alike.
    """

    positions: Sequence[int]
    all: bool
    where: Tensor
    weights: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Those rows of a tensor of all rows."""
        return tensor if self.all else tensor.index_select(0, self.where)

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Replace those rows of a tensor of all rows."""
        count = len(self.positions)
        into.index_copy_(0, self.where[:count], rows[:count])

    def padded(self, values: Sequence[Value]) -> list[Value]:
        """The values, one for each row, padded with the first one."""
        return [*values, *[values[0]] * (len(self.where) - len(values))]


@dataclass(slots=True, eq=False)
class _Pass:
    """The changes of one layer that one batch of products computes, at most one for each row."""

    changes: list[LowRank] = field(default_factory=list["LowRank"])
    positions: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])


class AdaptedNetwork:
    """A network whose rows may have adapters.

    Args:
        part: the network's name in a model folder, by which adapters name it.
        network: whose layers take and put out one entry for each row.
        device: where it is.
    """

    def __init__(self, part: str, network: nn.Module, device: torch.device) -> None:
        self._part = part
        self._device = device
        self._layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }

    @contextmanager
    def applied(self, adapters: RowAdapters | None) -> Generator[None]:
        """Add the changes of each row's adapters in the forward that runs inside.

        Args:
            adapters: of the rows of that forward; None where no row has any.
        """
        # Before all other hooks, so that those which edit a layer's output see it adapted; and
        # gone afterwards, so that forwards without adapters pay nothing.
        handles = [
            self._layers[name].register_forward_hook(hook, prepend=True)
            for name, hook in (self._hooks(adapters) if adapters else {}).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, adapters: RowAdapters) -> dict[str, Hook]:
        """By name of the layer, the hook that adds the changes of all rows."""
        passes: dict[str, dict[tuple[int, int], _Pass]] = {}
        for row, own in enumerate(adapters.rows):
            # A weight of 0 adds nothing, not even the rounding of a zero.
            for place, one in enumerate(weighted for weighted in own if weighted.weight):
                for name, change in one.adapter.parts.get(self._part, {}).items():
                    added = passes.setdefault(name, {}).setdefault((place, change.rank), _Pass())
                    added.changes.append(change)
                    added.positions.append(row)
                    added.weights.append(one.weight)
        known: dict[tuple[tuple[int, ...], tuple[float, ...]], _Rows] = {}

        def rows_of(added: _Pass) -> _Rows:
            key = tuple(added.positions), tuple(added.weights)
            if key not in known:
                known[key] = self._rows(added, adapters)
            return known[key]

        return {
            name: _adding(
                [(one.changes, rows_of(one)) for _, one in sorted(own.items(), key=itemgetter(0))]
            )
            for name, own in passes.items()
        }

    def _rows(self, added: _Pass, adapters: RowAdapters) -> _Rows:
        count, total = len(added.positions), len(adapters.rows)
        missing = total - count if adapters.fixed else 0
        positions = added.positions + added.positions[:1] * missing
        weights = added.weights + added.weights[:1] * missing
        return _Rows(
            positions=added.positions,
            # In place, products may take other paths than those of gathered rows do.
            all=count == total and not adapters.fixed,
            where=torch.tensor(positions).to(self._device, non_blocking=True),
            weights=torch.tensor(weights).view(-1, 1, 1).to(self._device, non_blocking=True),
        )


def _adding(passes: Sequence[tuple[Sequence[LowRank], _Rows]]) -> Hook:
    """A hook of one layer that adds changes, one pass after another."""

    def add(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            output = output.contiguous(memory_format=torch.channels_last)
        # Views: what is added to the tokens is added to the output.
        tokens = output.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else output
        tokens = tokens.view(len(tokens), -1, tokens.shape[-1])
        for changes, rows in passes:
            down = _down(layer, args[0], changes, rows)
            up = torch.stack([change.up for change in rows.padded(changes)]).mul_(rows.weights)
            if rows.all:
                tokens.baddbmm_(down, up.mT)
            else:
                rows.put(torch.baddbmm(rows.of(tokens), down, up.mT), tokens)
        return output

    return add


def _down(layer: Layer, x: Tensor, changes: Sequence[LowRank], rows: _Rows) -> Tensor:
    """What the first factors make of a layer's input, ``[rows, tokens, rank]``."""
    if isinstance(layer, nn.Conv2d):
        if not _pointwise(layer):
            if x.is_cuda and multiplies(layer):
                kernels = torch.stack([change.down for change in rows.padded(changes)])
                made = convolve_by_products(layer, rows.of(x), kernels)
                return made.permute(0, 2, 3, 1).flatten(1, 2)
            # Row by row: a grouped convolution costs up to five times as much on a CPU.
            conv: Any = F.conv2d
            reach = layer.stride, layer.padding, layer.dilation
            made = [
                conv(x[row : row + 1], change.down, None, *reach)
                for row, change in zip(rows.positions, changes, strict=True)
            ]
            return torch.cat(rows.padded(made)).permute(0, 2, 3, 1).flatten(1, 2)
        x = x.permute(0, 2, 3, 1)
    tokens = rows.of(x.reshape(len(x), -1, x.shape[-1]))
    down = torch.stack([change.down for change in rows.padded(changes)])
    return torch.bmm(tokens, down.flatten(2).mT)


def _pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)

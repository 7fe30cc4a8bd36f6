"""Applies changes of the weights and biases of norms to some rows of a forward pass.

A norm multiplies its normalized input by its weight and adds its bias. Therefore two terms are
added to its output: the normalized input times the change of the weight, and the change of the
bias. The norm's own weight is not read, wherever it is kept.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from server.models.adapters.adapted_rows import AdaptedRows, for_any_forward, passes, where

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from server.models.adapters.adapted_rows import Sent
    from server.models.adapters.adapter import RowAdapters, Weighted
    from server.models.adapters.norms import NormChange

__all__ = ["ChangedNorm", "norm_changes"]

_Changes: TypeAlias = "list[tuple[NormChange, float]]"
"""All changes of a norm in one row, with their weights."""


@dataclass(frozen=True, slots=True, eq=False)
class ChangedNorm:
    """The changes of a norm in a forward pass.

    Attributes:
        plain: the norm without weight and bias.
        rows: rows of the forward pass that are changed.
        weight: changes of the weight, ``[rows, channels]``, float32; None if no row has any.
        bias: changes of the bias, ``[rows, channels]``, float32; None if no row has any.
        fixed: whether all rows are normalized again, so that a row's bits do not depend on how many
            rows have adapters. By default only those that are changed are.
    """

    plain: nn.Module
    rows: AdaptedRows
    weight: Tensor | None
    bias: Tensor | None
    fixed: bool

    @property
    def nbytes(self) -> int:
        """Memory of the changes, in bytes."""
        return sum(one.nbytes for one in (self.weight, self.bias) if one is not None)

    def hooked(self, norm: nn.Module, rows: int) -> RemovableHandle:
        """Register the hook on the norm.

        Args:
            norm: the norm.
            rows: number of rows of the forward pass.
        """

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for x, own in zip(passes(args[0], rows), passes(output, rows), strict=True):
                self._add(x, own)
            return output

        # Before all other forward hooks, so that hooks that edit its output see it adapted.
        return norm.register_forward_hook(after, prepend=True)

    def _add(self, x: Tensor, output: Tensor) -> None:
        """Add the changes to the output, in place."""
        own = self.rows.of(output)
        if self.weight is not None:
            normed = self._normed(x)
            # No fused operation, whose rounding may depend on the number of rows.
            own.add_(normed.mul_(self._along(normed, self.weight)))
        if self.bias is not None:
            own.add_(self._along(own, self.bias))
        if isinstance(self.rows.where, torch.Tensor):
            output.index_copy_(0, self.rows.where, own)

    def _normed(self, x: Tensor) -> Tensor:
        """The normalized input of the rows that are changed."""
        forward: Any = type(self.plain).forward
        if self.fixed:
            return self.rows.of(forward(self.plain, x))
        return forward(self.plain, self.rows.of(x))

    def _along(self, of: Tensor, changes: Tensor) -> Tensor:
        """Changes ``[rows, channels]`` in a shape that broadcasts to a tensor of these rows."""
        ones = (1,) * (of.ndim - 2)
        if isinstance(self.plain, nn.GroupNorm):
            return changes.view(*changes.shape, *ones)
        return changes.view(len(changes), *ones, -1)


def norm_changes(
    part: str, norms: Mapping[str, nn.Module], adapters: RowAdapters, sent: Sent
) -> dict[str, ChangedNorm]:
    """Determine the changes of each norm, by the norm's name.

    Args:
        part: name of the network in a model folder.
        norms: norms of the network, by name.
        adapters: adapters of the rows of the forward pass.
        sent: copies numbers to the device of the network.
    """

    @cache
    def of_row(own: tuple[Weighted, ...]) -> dict[str, _Changes]:
        by_norm: dict[str, _Changes] = {}
        for one in own:
            # An adapter with weight 0 is skipped.
            for name, change in one.adapter.norms.get(part, {}).items() if one.weight else ():
                by_norm.setdefault(name, []).append((change, one.weight))
        return by_norm

    total, by_norm = len(adapters.rows), dict[str, dict[int, _Changes]]()
    for row, own in enumerate(adapters.rows):
        for name, changes in of_row(own).items():
            by_norm.setdefault(name, {})[row] = changes
    made: dict[str, ChangedNorm] = {}
    with for_any_forward(), torch.no_grad():
        for name, rows in by_norm.items():
            weights = [[(one.weight, by) for one, by in own] for own in rows.values()]
            biases = [[(one.bias, by) for one, by in own] for own in rows.values()]
            adapted = AdaptedRows(where([*rows], total, sent), len(rows), 1)
            both = _sums(weights), _sums(biases)
            made[name] = ChangedNorm(_plain(norms[name]), adapted, *both, adapters.fixed)
    return made


def _sums(rows: Sequence[Iterable[tuple[Tensor | None, float]]]) -> Tensor | None:
    """The sum of each row's changes, ``[rows, channels]``; None if no row has any."""
    given = [[(one, by) for one, by in own if one is not None] for own in rows]
    like = next((one for own in given for one, _ in own), None)
    if like is None:
        return None
    return torch.stack(
        [sum((by * one for one, by in own), torch.zeros_like(like)) for own in given]
    )


def _plain(norm: nn.Module) -> nn.Module:
    """A copy of a norm without weight and bias."""
    plain = copy(norm)
    vars(plain)["_parameters"] = dict.fromkeys(vars(norm)["_parameters"])
    return plain

"""Which rows of a forward change which layers, and what of it is one batch of products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from server.models.adapters.convolution import multiplies
from server.models.adapters.stack import Rows, longest_run, reaches, stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from server.models.adapters.adapter import RowAdapters
    from server.models.adapters.stack import Changes, Layer, Stack

__all__ = ["LayerChanges", "layer_changes"]

Sent: TypeAlias = "Callable[[tuple[Any, ...]], Tensor]"

OfRows: TypeAlias = "dict[int, Changes]"


@dataclass(slots=True, eq=False)
class LayerChanges:
    """Changes of one layer that are one batch of products.

    Attributes:
        layer: that is changed.
        rows: of the forward.
        entries: the changes of each run of rows.
        weights: see ``stack.stacked``.
        by_products: likewise.
    """

    layer: Layer
    rows: Rows
    entries: list[Changes]
    weights: Tensor
    by_products: bool
    _kept: Stack | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the stack, in bytes."""
        change, _ = self.entries[0][0]
        return len(self.entries) * self.weights.shape[-1] * (change.nbytes // change.rank)

    def stack(self, *, keep: bool) -> Stack:
        """The factors of all rows.

        Args:
            keep: give the same stack again next time. Of the adapters nothing is kept then.
        """
        if self._kept is not None:
            return self._kept
        if not keep:
            return self._stack()
        with _for_any_forward(), torch.no_grad():
            self._kept = self._stack()
        self.entries = []
        return self._kept

    def _stack(self) -> Stack:
        own = self.layer, self.rows, self.entries, self.weights
        return stacked(*own, by_products=self.by_products)


def layer_changes(
    part: str,
    layers: Mapping[str, Layer],
    adapters: RowAdapters,
    device: torch.device,
    *,
    by_products: bool,
) -> dict[str, list[LayerChanges]]:
    """What is added to each layer's output, by the layer's name.

    All changes of a layer are one batch of products. Not so in a fixed forward, where the bits of a
    row must not depend on its neighbours' ranks: there are only changes of one rank, and one of
    each row, in a batch.

    Args:
        part: the network's name in a model folder.
        layers: of the network, by name.
        adapters: of the rows of the forward.
        device: of the network.
        by_products: whether to make convolutions products of matrices, where they can be.
    """

    @cache
    def sent(numbers: tuple[Any, ...]) -> Tensor:
        with _for_any_forward():
            return torch.tensor(numbers).to(device, non_blocking=True)

    return {
        name: [
            _joint(layers[name], own, adapters, sent, by_products=by_products)
            for _, own in sorted(batches.items(), key=itemgetter(0))
        ]
        for name, batches in _by_layer(part, adapters).items()
    }


def _by_layer(part: str, adapters: RowAdapters) -> dict[str, dict[tuple[int, int], OfRows]]:
    found: dict[str, dict[tuple[int, int], OfRows]] = {}
    for row, own in enumerate(adapters.rows):
        # A weight of 0 adds nothing, not even the rounding of a zero.
        for place, one in enumerate(weighted for weighted in own if weighted.weight):
            for name, change in one.adapter.parts.get(part, {}).items():
                batch = (place, change.rank) if adapters.fixed else (0, 0)
                of_rows = found.setdefault(name, {}).setdefault(batch, {})
                of_rows.setdefault(row, []).append((change, one.weight))
    return found


def _joint(
    layer: Layer, own: OfRows, adapters: RowAdapters, sent: Sent, *, by_products: bool
) -> LayerChanges:
    by_products = by_products and reaches(layer) and multiplies(layer)
    # Products that are added up need an entry for each row, as cells of two are not neighbours.
    run = 1 if adapters.fixed or by_products else longest_run([*own.values()])
    entries = [*own.values()][::run]
    if adapters.fixed:
        entries += entries[:1] * (len(adapters.rows) - len(own))
    rows = Rows(_where([*own], adapters, sent), len(own), run)
    return LayerChanges(layer, rows, entries, sent(_weights(entries)), by_products)


def _where(positions: list[int], adapters: RowAdapters, sent: Sent) -> slice | Tensor | None:
    first, count, total = positions[0], len(positions), len(adapters.rows)
    if adapters.fixed:
        # In place, products may take other paths than those of gathered rows do.
        return sent((*positions, *positions[:1] * (total - count)))
    if count == total:
        return None
    if positions[-1] - first == count - 1:
        return slice(first, first + count)
    return sent(tuple(positions))


def _weights(entries: list[Changes]) -> tuple[tuple[tuple[float, ...]], ...]:
    """Of each entry and rank, 0 behind the ranks of an entry with less than another one."""
    of_ranks = [[weight for one, weight in own for _ in range(one.rank)] for own in entries]
    most = max(map(len, of_ranks))
    return tuple(((*own, *[0.0] * (most - len(own))),) for own in of_ranks)


def _for_any_forward() -> AbstractContextManager[None]:
    """Tensors that are made inside may also be read where a forward is differentiated."""
    return torch.inference_mode(mode=False)

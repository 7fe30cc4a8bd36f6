"""Determines the changes of each layer in a forward pass, grouped into batches of products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias

import torch

from server.models.adapters.adapted_rows import AdaptedRows, for_any_forward, where
from server.models.adapters.convolution import multiplies
from server.models.adapters.dora import composed
from server.models.adapters.row_scales import InputScales, OutputScales
from server.models.adapters.stack import longest_run, reaches, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from server.models.adapters.adapted_rows import Sent
    from server.models.adapters.adapter import LowRank, RowAdapters, Weighted
    from server.models.adapters.dora import WeightScales
    from server.models.adapters.stack import Changes, Layer, Stack

__all__ = ["ChangedLayer", "LayerChanges", "layer_changes"]

OfRows: TypeAlias = "dict[int, Changes]"

_Placed: TypeAlias = "tuple[int, LowRank, float]"


@dataclass(slots=True, eq=False)
class LayerChanges:
    """Changes of one layer that are computed in one batch of products.

    Attributes:
        layer: the layer.
        rows: rows of the forward pass that are changed.
        entries: changes of each run of rows.
        weights: see ``stack.stacked``.
        by_products: see ``stack.stacked``.
    """

    layer: Layer
    rows: AdaptedRows
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
        """The stacked factors of all rows.

        Args:
            keep: whether to return the same stack next time, and release the adapters' factors.
        """
        if self._kept is not None:
            return self._kept
        if not keep:
            return self._stack()
        with for_any_forward(), torch.no_grad():
            self._kept = self._stack()
        self.entries = []
        return self._kept

    def _stack(self) -> Stack:
        own = self.layer, self.rows, self.entries, self.weights
        return stacked(*own, by_products=self.by_products)


@dataclass(frozen=True, slots=True, eq=False)
class ChangedLayer:
    """The changes of a layer in a forward pass.

    Attributes:
        changes: changes that are added to its output.
        inputs: factors applied to its input; None where no row has any.
        outputs: factors applied to its output before the changes are added, and changes of its
            bias; None where no row has any.
    """

    changes: Sequence[LayerChanges]
    inputs: InputScales | None
    outputs: OutputScales | None

    @property
    def nbytes(self) -> int:
        """Memory of the stacks, the factors and the changes of the bias, in bytes."""
        scales = [one.nbytes for one in (self.inputs, self.outputs) if one is not None]
        return sum(one.nbytes for one in self.changes) + sum(scales)


@dataclass(slots=True, eq=False)
class _Rows:
    """Changes of a layer by row: batches of changes, and factors."""

    batches: dict[tuple[int, int], OfRows]
    scales: dict[int, WeightScales]


def layer_changes(
    part: str,
    layers: Mapping[str, Layer],
    adapters: RowAdapters,
    sent: Sent,
    *,
    by_products: bool,
) -> dict[str, ChangedLayer]:
    """The changes of each layer, by the layer's name.

    All changes of a layer form one batch of products, except in a fixed forward pass, where the
    bits of a row must not depend on the ranks of other rows: there a batch has only changes of one
    rank, and one of each row.

    Args:
        part: name of the network in a model folder.
        layers: layers of the network, by name.
        adapters: adapters of the rows of the forward pass.
        sent: copies numbers to the device of the network.
        by_products: whether to compute convolutions as matrix products where possible.
    """
    total, found = len(adapters.rows), dict[str, ChangedLayer]()
    for name, own in _by_layer(part, adapters).items():
        changes = [
            _joint(layers[name], batch, adapters, sent, by_products=by_products)
            for _, batch in sorted(own.batches.items(), key=itemgetter(0))
        ]
        found[name] = ChangedLayer(
            changes,
            _input_scales(own, total, sent),
            _output_scales(own, total, sent, layers[name]),
        )
    return found


def _by_layer(part: str, adapters: RowAdapters) -> dict[str, _Rows]:
    # Rows with the same adapters share these objects, and so form one run.
    @cache
    def of_layers(own: tuple[Weighted, ...]) -> dict[str, tuple[WeightScales, list[_Placed]]]:
        return _composed(part, own)

    found: dict[str, _Rows] = {}
    with for_any_forward(), torch.no_grad():
        for row, own in enumerate(adapters.rows):
            for name, (scales, changes) in of_layers(own).items():
                layer = found.setdefault(name, _Rows({}, {}))
                layer.scales[row] = scales
                for place, change, weight in changes:
                    batch = (place, change.rank) if adapters.fixed else (0, 0)
                    layer.batches.setdefault(batch, {}).setdefault(row, []).append((change, weight))
    return found


def _composed(
    part: str, own: tuple[Weighted, ...]
) -> dict[str, tuple[WeightScales, list[_Placed]]]:
    """For one row, the factors on each layer's weight, and changes with their adapter's index."""
    by_layer: dict[str, list[_Placed]] = {}
    # An adapter with weight 0 is skipped, so that not even a zero is added and rounded.
    for place, one in enumerate(weighted for weighted in own if weighted.weight):
        for name, change in one.adapter.parts.get(part, {}).items():
            by_layer.setdefault(name, []).append((place, change, one.weight))
    made: dict[str, tuple[WeightScales, list[_Placed]]] = {}
    for name, placed in by_layer.items():
        scales, changes = composed([(change, weight) for _, change, weight in placed])
        places = (place for place, *_ in placed)
        made[name] = scales, [(place, *one) for place, one in zip(places, changes, strict=True)]
    return made


def _input_scales(own: _Rows, total: int, sent: Sent) -> InputScales | None:
    factors = {row: one.inputs for row, one in own.scales.items() if one.inputs is not None}
    return InputScales(*_scaled_rows(factors, total, sent)) if factors else None


def _output_scales(own: _Rows, total: int, sent: Sent, layer: Layer) -> OutputScales | None:
    scaled = {
        row: one
        for row, one in own.scales.items()
        if one.outputs is not None or one.bias is not None
    }
    if not scaled:
        return None
    with for_any_forward(), torch.no_grad():
        given = [one for scales in scaled.values() for one in (scales.outputs, scales.bias)]
        like = next(one for one in given if one is not None)
        ones, zeros = torch.ones_like(like), torch.zeros_like(like)
        factors = {row: ones if one.outputs is None else one.outputs for row, one in scaled.items()}
        biases = None
        if any(one.bias is not None for one in scaled.values()):
            biases = torch.stack([zeros if o.bias is None else o.bias for o in scaled.values()])
        rows, factor = _scaled_rows(factors, total, sent)
        return OutputScales.of(rows, factor, layer, biases)


def _scaled_rows(
    factors: Mapping[int, Tensor], total: int, sent: Sent
) -> tuple[AdaptedRows, Tensor]:
    """The rows of a forward pass that have factors, and these factors ``[rows, entries]``."""
    with for_any_forward(), torch.no_grad():
        factor = torch.stack([*factors.values()])
    return AdaptedRows(where([*factors], total, sent), len(factors), 1), factor


def _joint(
    layer: Layer, own: OfRows, adapters: RowAdapters, sent: Sent, *, by_products: bool
) -> LayerChanges:
    by_products = by_products and reaches(layer) and multiplies(layer)
    # Summed products need an entry for each row, as the cells of two rows are not adjacent.
    run = 1 if adapters.fixed or by_products else longest_run([*own.values()])
    entries = [*own.values()][::run]
    if adapters.fixed:
        entries += entries[:1] * (len(adapters.rows) - len(own))
    rows = AdaptedRows(_positions([*own], adapters, sent), len(own), run)
    return LayerChanges(layer, rows, entries, sent(_weights(entries)), by_products)


def _positions(own: list[int], adapters: RowAdapters, sent: Sent) -> slice | Tensor | None:
    total = len(adapters.rows)
    if adapters.fixed:
        # Products in place may use other kernels than products of gathered rows.
        return sent((*own, *own[:1] * (total - len(own))))
    return where(own, total, sent)


def _weights(entries: list[Changes]) -> tuple[tuple[tuple[float, ...]], ...]:
    """Weight of each entry and rank, padded with 0 to the largest rank of all entries."""
    of_ranks = [[weight for one, weight in own for _ in range(one.rank)] for own in entries]
    max_rank = max(map(len, of_ranks))
    return tuple(((*own, *[0.0] * (max_rank - len(own))),) for own in of_ranks)

"""The rows of a tick through the network, each with what it changes there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from guidance.edits import ApartFrom, WeakModel
from server.engine.state.padding import padded
from server.engine.terms.avoided import kept_apart

if TYPE_CHECKING:
    from torch import Tensor

    from guidance import Edit
    from server.engine.state.batch import Batch
    from server.models.hosted import HostedModel

WEAK = WeakModel()


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the network is given for some rows.

    Attributes:
        x: at the network's own scale, ``[rows, C, h, w]``.
        t: what it is told of the noise level, ``[rows]``.
        conditioning: ``[rows, tokens, features]``.
        edits: what each row changes inside it; empty where none does.
        scales: guidance scales less 1 that it is told, ``[rows]``; None where it is told none.
    """

    x: Tensor
    t: Tensor
    conditioning: Tensor
    edits: list[tuple[Edit, ...]]
    scales: Tensor | None

    def of(self, rows: list[int], where: Tensor) -> Inputs:
        """Those of some rows, given as a list and as a tensor."""
        x, t, conditioning = (a.index_select(0, where) for a in (self.x, self.t, self.conditioning))
        scales = None if self.scales is None else self.scales.index_select(0, where)
        return Inputs(x, t, conditioning, _located(self.edits, rows), scales)

    def padded(self, count: int | None) -> Inputs:
        """The same with the first row repeated until there are ``count``."""
        if count is None:
            return self
        edits = self.edits + self.edits[:1] * (count - len(self.edits))
        scales = None if self.scales is None else padded(self.scales, count)
        x, t, conditioning = (padded(a, count) for a in (self.x, self.t, self.conditioning))
        return Inputs(x, t, conditioning, edits, scales)


def forward(batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    """What the network puts out for the rows, and its companion for those that are to be weak.

    Args:
        batch: the rows' images.
        x: at the network's own scale, ``[rows, C, h, w]``.
        t: what it is told of the noise level, ``[rows]``.
    """
    inputs, model = _inputs(batch, x, t), batch.lane.model
    weak = [row for row, changes in enumerate(inputs.edits) if WEAK in changes]
    if not weak:
        return _evaluated(model, inputs.padded(batch.fixed_rows))[: len(x)]
    strong = [row for row, changes in enumerate(inputs.edits) if WEAK not in changes]
    raw = torch.empty_like(x)
    plain = replace(inputs, edits=[])
    for evaluate, of_all, rows in ((_weakly, plain, weak), (_evaluated, inputs, strong)):
        where = batch.lane.indices(rows)
        out = evaluate(model, of_all.of(rows, where).padded(batch.fixed_rows))
        raw.index_copy_(0, where, out[: len(rows)])
    return raw


def _inputs(batch: Batch, x: Tensor, t: Tensor) -> Inputs:
    owners = [batch.sequences[i] for i in batch.owners]
    conditioning = torch.stack(
        [owner.conditioning[k] for owner, k in zip(owners, batch.numbers, strict=True)]
    )
    if (references := batch.references) is not None:
        rows = batch.lane.indices(references.rows)
        conditioning.index_copy_(0, rows, references.conditioning)
    edits: list[tuple[Edit, ...]] = []
    if any(sequence.guidance.edited for sequence in batch.sequences):
        edits = [owner.guidance.edits[k] for owner, k in zip(owners, batch.numbers, strict=True)]
    for row, edit in kept_apart(batch).items():
        edits = edits or [()] * len(owners)
        edits[row] = (*edits[row], edit)
    scales: Tensor | None = None
    if any(sequence.guidance.told_scale is not None for sequence in batch.sequences):
        scales = t.new_tensor([owner.guidance.told_scale or 0.0 for owner in owners])
    return Inputs(x, t, conditioning, edits, scales)


def _located(edits: list[tuple[Edit, ...]], rows: list[int]) -> list[tuple[Edit, ...]]:
    """The edits of some rows, whose references are counted among those rows."""
    if not edits:
        return []
    places: dict[int | None, int] = {row: place for place, row in enumerate(rows)}
    return [
        tuple(
            replace(edit, reference=places[edit.reference]) if isinstance(edit, ApartFrom) else edit
            for edit in edits[row]
        )
        for row in rows
    ]


def _evaluated(model: HostedModel, inputs: Inputs) -> Tensor:
    edits = inputs.edits if any(inputs.edits) else None
    return model.evaluate(inputs.x, inputs.t, inputs.conditioning, edits, inputs.scales)


def _weakly(model: HostedModel, inputs: Inputs) -> Tensor:
    return model.evaluate_weak(inputs.x, inputs.t, inputs.conditioning)

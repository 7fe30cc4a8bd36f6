"""The rows of a tick through the network, each with what it changes there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from guidance.edits import WeakModel
from server.engine.state.padding import padded
from server.engine.terms.avoided import kept_apart
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from guidance import Edit
    from server.engine.state.batch import Batch

WEAK = WeakModel()


def forward(batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    """What the network puts out for the rows, and its companion for those that are to be weak.

    Args:
        batch: the rows' images.
        x: at the network's own scale, ``[rows, C, h, w]``.
        t: what it is told of the noise level, ``[rows]``.
    """
    inputs, model = _inputs(batch, t), batch.lane.model
    weak = [row for row, changes in enumerate(inputs.edits) if WEAK in changes]
    if not weak:
        return _evaluated(model.evaluate, x, t, inputs, batch.fixed_rows)
    strong = [row for row, changes in enumerate(inputs.edits) if WEAK not in changes]
    raw = torch.empty_like(x)
    plain = replace(inputs, edits=())
    parts = (model.evaluate_weak, plain, weak), (model.evaluate, inputs, strong)
    for evaluate, of_all, rows in parts:
        where = batch.lane.indices(rows)
        own = x.index_select(0, where), t.index_select(0, where), of_all.of(rows, where)
        raw.index_copy_(0, where, _evaluated(evaluate, *own, batch.fixed_rows))
    return raw


def _inputs(batch: Batch, t: Tensor) -> RowInputs:
    owners = [batch.sequences[i] for i in batch.owners]
    conditioning = batch.lane.model.stack(
        [owner.conditioning[k] for owner, k in zip(owners, batch.numbers, strict=True)]
    )
    if (references := batch.references) is not None:
        rows = batch.lane.indices(references.rows)
        conditioning = conditioning.put(rows, references.conditioning)
    edits: list[tuple[Edit, ...]] = []
    if any(sequence.guidance.edited for sequence in batch.sequences):
        edits = [owner.guidance.edits[k] for owner, k in zip(owners, batch.numbers, strict=True)]
    for row, edit in kept_apart(batch).items():
        edits = edits or [()] * len(owners)
        edits[row] = (*edits[row], edit)
    scales: Tensor | None = None
    if any(sequence.guidance.told_scale is not None for sequence in batch.sequences):
        scales = t.new_tensor([owner.guidance.told_scale or 0.0 for owner in owners])
    return RowInputs(conditioning, edits, scales)


def _evaluated(
    evaluate: Callable[[Tensor, Tensor, RowInputs], Tensor],
    x: Tensor,
    t: Tensor,
    inputs: RowInputs,
    fixed_rows: int | None,
) -> Tensor:
    raw = evaluate(padded(x, fixed_rows), padded(t, fixed_rows), inputs.padded(fixed_rows))
    return raw[: len(x)]

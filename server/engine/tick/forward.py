"""The rows of a tick through the network, each with what it changes there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from guidance.edits import WeakModel
from server.engine.state.padding import padded
from server.engine.terms.seen import ForwardRows
from server.models.adapters.adapter import RowAdapters
from server.models.controls.row_controls import RowControls
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from server.engine.state.batch import Batch

WEAK = WeakModel()


def forward_rows(batch: Batch) -> ForwardRows:
    """What the rows of the forward are given by their images' own settings, terms aside."""
    predictions = [
        batch.sequences[i].guidance.predictions[number]
        for i, number in zip(batch.owners, batch.numbers, strict=True)
    ]
    told = [
        batch.sequences[i].conditioning[prediction.text]
        for i, prediction in zip(batch.owners, predictions, strict=True)
    ]
    return ForwardRows(
        x=batch.columns[:, 0].index_select(0, batch.lane.indices(batch.owners)),
        conditioning=batch.lane.model.stack(told, fixed=batch.fixed_rows is not None),
        edits=[prediction.edits for prediction in predictions],
    )


def forward(batch: Batch, rows: ForwardRows, x: Tensor, t: Tensor) -> Tensor:
    """What the network puts out for the rows, and its companion for those that are to be weak.

    Args:
        batch: the rows' images.
        rows: what they are given.
        x: at the network's own scale, ``[rows, C, h, w]``.
        t: what it is told of the noise level, ``[rows]``.
    """
    inputs, lane = _inputs(batch, rows, t), batch.lane
    weak = [row for row, changes in enumerate(inputs.edits) if WEAK in changes]
    if not weak:
        return _evaluated(lane.evaluate, x, t, inputs, batch.fixed_rows)
    strong = [row for row, changes in enumerate(inputs.edits) if WEAK not in changes]
    raw = torch.empty_like(x)
    plain = replace(inputs, edits=())
    parts = (lane.model.evaluate_weak, plain, weak), (lane.evaluate, inputs, strong)
    for evaluate, of_all, part in parts:
        where = lane.indices(part)
        own = x.index_select(0, where), t.index_select(0, where), of_all.of(part, where)
        raw.index_copy_(0, where, _evaluated(evaluate, *own, batch.fixed_rows))
    return raw


def _inputs(batch: Batch, rows: ForwardRows, t: Tensor) -> RowInputs:
    owners = [batch.sequences[i] for i in batch.owners]
    scales: Tensor | None = None
    if any(sequence.guidance.told_scale is not None for sequence in batch.sequences):
        told = torch.tensor([owner.guidance.told_scale or 0.0 for owner in owners])
        scales = told.to(t.device, non_blocking=True)
    edits = rows.edits if any(rows.edits) else ()
    adapters = RowAdapters(tuple(owner.task.adapters for owner in owners))
    controls = RowControls(tuple(owner.controls for owner in owners))
    channels = [owner.channels for owner in owners if owner.channels is not None]
    return RowInputs(
        rows.conditioning,
        edits,
        scales,
        torch.stack(channels) if channels else None,
        against=rows.against,
        adapters=adapters if adapters else None,
        controls=controls if controls else None,
    )


def _evaluated(
    evaluate: Callable[[Tensor, Tensor, RowInputs], Tensor],
    x: Tensor,
    t: Tensor,
    inputs: RowInputs,
    fixed_rows: int | None,
) -> Tensor:
    raw = evaluate(padded(x, fixed_rows), padded(t, fixed_rows), inputs.padded(fixed_rows))
    return raw[: len(x)]

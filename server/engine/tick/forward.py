"""The forward pass of a tick: the inputs of its rows, and the calls of the network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from guidance.edits import ApartFrom, WeakModel
from server.engine.state.lane import largest
from server.engine.state.padding import padded
from server.engine.terms.seen import ForwardRows
from server.models.adapters.adapter import RowAdapters
from server.models.conditioning import joined
from server.models.controls.row_controls import RowControls
from server.models.image_prompts.row_image_prompts import RowImagePrompts
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Listed
    from contextlib import AbstractContextManager

    from torch import Tensor

    from guidance.edits import Edit
    from server.engine.state.batch import Batch

WEAK = WeakModel()


def forward_rows(batches: Listed[Batch]) -> list[ForwardRows]:
    """Collect the inputs that rows get from their images' own settings, without those of terms.

    Args:
        batches: batches of one model; their rows follow each other in the forward pass.
    """
    predictions = [
        [
            batch.sequences[i].guidance.predictions[number]
            for i, number in zip(batch.owners, batch.numbers, strict=True)
        ]
        for batch in batches
    ]
    conditioning = [
        batch.sequences[i].conditioning_for(prediction.text)
        for batch, own in zip(batches, predictions, strict=True)
        for i, prediction in zip(batch.owners, own, strict=True)
    ]
    lane, fixed = batches[0].lane, batches[0].fixed_rows is not None
    texts = lane.model.stack(conditioning, fixed=fixed).divided([batch.rows for batch in batches])
    return [
        ForwardRows(
            x=batch.columns[:, 0].index_select(0, lane.indices(batch.owners)),
            conditioning=conditioning,
            edits=[prediction.edits for prediction in own],
        )
        for batch, conditioning, own in zip(batches, texts, predictions, strict=True)
    ]


def forward(
    batches: Listed[Batch],
    rows: Listed[ForwardRows],
    x: Listed[Tensor],
    t: Listed[Tensor],
    watch: AbstractContextManager[object],
) -> list[Tensor]:
    """Run the network on the rows, and its weaker companion on rows that ask for it.

    Args:
        batches: images of the rows; more than one batch only for a model that mixes sizes.
        rows: inputs of the rows of each batch.
        x: noisy latents as scaled for the network, ``[rows, C, h, w]`` of each batch.
        t: noise level as given to the network, ``[rows]`` of each batch.
        watch: context that is entered while the network runs.

    Returns:
        The network's outputs, ``[rows, C, h, w]`` of each batch.
    """
    inputs = _inputs(batches, rows, t[0])
    with watch:
        if len(batches) == 1:
            return [_of_one_size(batches[0], inputs, x[0], t[0])]
        lane = largest(batch.lane for batch in batches)
        return lane.evaluate_sizes(x, torch.cat([*t]), inputs)


def _of_one_size(batch: Batch, inputs: RowInputs, x: Tensor, t: Tensor) -> Tensor:
    lane = batch.lane
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


def _inputs(batches: Listed[Batch], rows: Listed[ForwardRows], t: Tensor) -> RowInputs:
    owners = [batch.sequences[i] for batch in batches for i in batch.owners]
    scales: Tensor | None = None
    if any(owner.guidance.embedded_scale is not None for owner in owners):
        embedded = torch.tensor([owner.guidance.embedded_scale or 0.0 for owner in owners])
        scales = embedded.to(t.device, non_blocking=True)
    edits = _edits(rows)
    adapters = RowAdapters(tuple(owner.task.adapters for owner in owners))
    numbered = [
        (batch.sequences[i], number)
        for batch in batches
        for i, number in zip(batch.owners, batch.numbers, strict=True)
    ]
    steering = tuple(owner.controls(number) for owner, number in numbered)
    controls = RowControls(steering, _prompts(batches))
    shown = RowImagePrompts(tuple(owner.image_prompts(number) for owner, number in numbered))
    channels = [owner.channels for owner in owners if owner.channels is not None]
    led_away = any(part.against is not None for part in rows)
    return RowInputs(
        joined([part.conditioning for part in rows]),
        edits if any(edits) else (),
        scales,
        torch.stack(channels) if channels else None,
        against=joined([part.against or part.conditioning for part in rows]) if led_away else None,
        adapters=adapters if adapters else None,
        controls=controls if controls else None,
        image_prompts=shown if shown else None,
    )


def _prompts(batches: Listed[Batch]) -> tuple[int, ...]:
    """For each row, the index of the row of its image's prompt.

    A batch's first rows are those of the prompts, in the order of its images.
    """
    found: list[int] = []
    for batch in batches:
        before = len(found)
        found += [before + i for i in batch.owners]
    return tuple(found)


def _edits(rows: Listed[ForwardRows]) -> list[tuple[Edit, ...]]:
    """Edits of all rows, with references renumbered from rows of a batch to rows of the pass."""
    edits: list[tuple[Edit, ...]] = []
    for part in rows:
        before = len(edits)
        edits += [tuple(_moved(edit, before) for edit in own) for own in part.edits]
    return edits


def _moved(edit: Edit, by: int) -> Edit:
    if not isinstance(edit, ApartFrom) or edit.reference is None:
        return edit
    return replace(edit, reference=edit.reference + by)


def _evaluated(
    evaluate: Callable[[Tensor, Tensor, RowInputs], Tensor],
    x: Tensor,
    t: Tensor,
    inputs: RowInputs,
    fixed_rows: int | None,
) -> Tensor:
    raw = evaluate(padded(x, fixed_rows), padded(t, fixed_rows), inputs.padded(fixed_rows))
    return raw[: len(x)]

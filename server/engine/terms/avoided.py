"""Rows of a forward that keep away from another row: that of a picture, or of a group's first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from guidance.edits import ApartFrom
    from server.engine.state.batch import Batch
    from server.engine.task import Group


def put_avoided(batch: Batch, x: Tensor) -> None:
    """Put the pictures that images avoid, noised to their stages' levels, in their rows.

    Args:
        batch: the images.
        x: where each row of the forward is evaluated, ``[rows, C, h, w]``, changed in place.
    """
    for i, (row, shown) in batch.avoided.items():
        plan, stage = batch.plans[i], batch.sequences[i].stage
        x[row] = plan.alpha[stage] * shown.latents + plan.sigma[stage] * shown.noise


def kept_apart(batch: Batch) -> dict[int, ApartFrom]:
    """Rows of the forward that move away from another row, with the change that does it.

    Those of an image that avoids a picture are all of its predictions but the picture's own. Those
    of a group are the predictions of all images but the first, which stays as it is; each has the
    same prediction of the first for its reference.
    """
    if not batch.avoided and not batch.groups:
        return {}
    rows = {
        (i, number): row
        for row, (i, number) in enumerate(zip(batch.owners, batch.numbers, strict=True))
    }
    edits: dict[int, ApartFrom] = {}
    for (i, _), row in rows.items():
        if i in batch.avoided and row != batch.avoided[i].row:
            edits[row] = replace(batch.avoided[i].shown.edit, reference=batch.avoided[i].row)
    for group, members in batch.groups:
        edits |= _apart_from_first(batch, group, members, rows)
    return edits


def _apart_from_first(
    batch: Batch, group: Group, members: list[int], rows: dict[tuple[int, int], int]
) -> dict[int, ApartFrom]:
    first, *others = members
    negtome = group.apart
    lead = batch.sequences[first]
    if negtome is None or not lead.guidance.apart[lead.stage]:
        return {}
    return {
        row: replace(negtome.edit, reference=rows[first, number])
        for (i, number), row in rows.items()
        if i in others
    }

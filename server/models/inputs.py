"""The inputs of the rows of a forward pass besides x and the noise level, in one bundle."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import torch

from guidance.edits import ApartFrom

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from guidance.edits import Edit
    from server.models.adapters.adapter import RowAdapters
    from server.models.conditioning import StackedConditioning
    from server.models.controls.row_controls import RowControls
    from server.models.edit_values import EditValues
    from server.models.image_prompts.row_image_prompts import RowImagePrompts

OUTSIDE_BLOCKS: Final = frozenset(
    {"conditioning", "edits", "scale_embedding", "channels", "controls"}
)
"""Inputs that the network reads before and between its blocks. Edits are an exception, for which
``RowInputs.plain`` checks separately."""


@dataclass(frozen=True, slots=True, eq=False)
class RowInputs:
    """All inputs of the network for some rows besides x and t.

    Attributes:
        conditioning: conditioning of each row on its prompt.
        edits: what each row changes inside the network, none of it refused by the model; empty
            where no row changes anything.
        scale_embedding: guidance scales less 1 that the network receives, ``[rows]``, 0 where a row
            has none; None where no row has one. For models whose facts say ``embeds_scale``.
        channels: channels that the network reads after those of x, ``[rows, channels, h, w]``; None
            where it reads only x.
        against: text away from which each row's attention is guided, for the edit
            ``NormalizedAttention``; arbitrary for rows without it. None where no row has it.
        adapters: low-rank changes to each row's layers; None where no row has any.
        controls: ControlNets that act on each row; None where no row has any.
        image_prompts: images that each row attends to besides its text; None where no row has any.
        edit_values: edits in the form that the model has prepared, read instead of ``edits``; see
            ``HostedModel.in_tensors``.
    """

    conditioning: StackedConditioning
    edits: Sequence[tuple[Edit, ...]] = ()
    scale_embedding: Tensor | None = None
    channels: Tensor | None = None
    against: StackedConditioning | None = None
    adapters: RowAdapters | None = None
    controls: RowControls | None = None
    image_prompts: RowImagePrompts | None = None
    edit_values: EditValues | None = None

    @property
    def plain(self) -> bool:
        """Whether no row changes anything inside the network's blocks."""
        given = {field.name for field in fields(self) if getattr(self, field.name) is not None}
        return not any(self.edits) and given <= OUTSIDE_BLOCKS

    def of(self, rows: Sequence[int], where: Tensor | None = None) -> RowInputs:
        """Select some rows; references of edits are renumbered accordingly.

        Args:
            rows: indices of the rows; a reference to a repeated row means its first occurrence.
            where: the same as int64 ``[n]`` on the device, if the caller has it already.
        """
        if where is None:
            where = torch.tensor(rows).to(self.conditioning.device, non_blocking=True)
        scales, channels = (
            None if tensor is None else tensor.index_select(0, where)
            for tensor in (self.scale_embedding, self.channels)
        )
        return RowInputs(
            self.conditioning.select(where),
            _located(self.edits, rows),
            scales,
            channels,
            None if self.against is None else self.against.select(where),
            None if self.adapters is None else self.adapters.of(rows) or None,
            None if self.controls is None else self.controls.of(rows) or None,
            None if self.image_prompts is None else self.image_prompts.of(rows) or None,
        )

    def padded(self, count: int | None, *, fixed: bool = True) -> RowInputs:
        """Repeat the first row until there are ``count`` rows.

        Repeated rows have neither ControlNets nor image prompts. Their outputs are not used.

        Args:
            count: number of rows; None adds none.
            fixed: whether all forward passes have this many rows, so that a row's bits do not
                depend on the other rows; repeated rows then have no adapters. Otherwise they have
                those of the last row, and no edits.
        """
        if count is None:
            return self
        rows, adapters, controls = len(self.conditioning), self.adapters, self.controls
        prompts = self.image_prompts
        repeated = self if count == rows else self.of([*range(rows), *[0] * (count - rows)])
        edits = [*self.edits, *[()] * (count - rows)] if self.edits else ()
        return replace(
            repeated,
            edits=repeated.edits if fixed else edits,
            adapters=None if adapters is None else adapters.padded(count, fixed=fixed),
            controls=None if controls is None else controls.padded(count, fixed=fixed),
            image_prompts=None if prompts is None else prompts.padded(count, fixed=fixed),
        )


def _located(edits: Sequence[tuple[Edit, ...]], rows: Sequence[int]) -> list[tuple[Edit, ...]]:
    """The edits of selected rows, with references renumbered accordingly."""
    if not edits:
        return []
    places: dict[int | None, int] = {}
    for place, row in enumerate(rows):
        places.setdefault(row, place)
    return [
        tuple(
            replace(edit, reference=places[edit.reference]) if isinstance(edit, ApartFrom) else edit
            for edit in edits[row]
        )
        for row in rows
    ]

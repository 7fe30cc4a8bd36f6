"""The image prompts of the rows of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["EqualLengthForm", "EqualLengthRows", "RowImagePrompt", "RowImagePrompts"]


@dataclass(frozen=True, slots=True, eq=False)
class RowImagePrompt:
    """An image prompt to which a row attends in addition to its text.

    Attributes:
        attended: keys and values of all layers, ``[tokens, features]``.
        scale: factor on the attention output.
        region: further factors, ``[queries, 1]``, by a layer's number of queries; None for the
            whole image.
    """

    attended: Tensor
    scale: float
    region: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class EqualLengthForm:
    """The non-tensor parts of :class:`EqualLengthRows`.

    Attributes:
        rows: number of rows over which attention runs.
        onto: number of rows that have image prompts.
        regions: numbers of queries; None where all image prompts act on the whole image.
    """

    rows: int
    onto: int
    regions: tuple[int, ...] | None

    def together(self, tensors: Mapping[str, Tensor]) -> EqualLengthRows:
        """Rebuild the :class:`EqualLengthRows` of this form.

        Args:
            tensors: tensors by the names in ``AlikeRows.tensors``.
        """
        rows, attended, onto, scales = (
            tensors[name] for name in ("rows", "attended", "onto", "scales")
        )
        regions = None
        if self.regions is not None:
            regions = {queries: tensors[str(queries)] for queries in self.regions}
        return EqualLengthRows(rows, attended, onto, scales, regions)


@dataclass(frozen=True, slots=True, eq=False)
class EqualLengthRows:
    """Rows of a forward pass whose image prompts have the same number of tokens, each row once.

    Attributes:
        rows: indices of the rows, int64 ``[n]``; padded with the first one where the number of rows
            is fixed.
        attended: their keys and values, ``[n, tokens, features]``.
        onto: indices of the rows without the padding, int64 ``[m]``.
        scales: factors on their attention output, ``[m, 1, 1]``.
        regions: further factors, ``[m, queries, 1]``, by a layer's number of queries; None where
            all image prompts act on the whole image.
    """

    rows: Tensor
    attended: Tensor
    onto: Tensor
    scales: Tensor
    regions: Mapping[int, Tensor] | None

    @property
    def form(self) -> EqualLengthForm:
        """Everything except the tensors."""
        regions = None if self.regions is None else tuple(self.regions)
        return EqualLengthForm(len(self.rows), len(self.onto), regions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; a region is named by its number of queries."""
        regions = {str(queries): part for queries, part in (self.regions or {}).items()}
        return regions | {
            "rows": self.rows,
            "attended": self.attended,
            "onto": self.onto,
            "scales": self.scales,
        }


@dataclass(frozen=True, slots=True, eq=False)
class RowImagePrompts:
    """The image prompts of the rows of a forward pass.

    Attributes:
        rows: image prompts of each row, in order. The attention outputs of several are summed.
        fixed: whether attention runs over as many rows as the forward pass has, so that a row's
            bits do not depend on how many rows have image prompts.
        together: the rows by number of tokens, if they have been collected already.
    """

    rows: tuple[tuple[RowImagePrompt, ...], ...]
    fixed: bool = False
    together: tuple[EqualLengthRows, ...] = ()

    def __bool__(self) -> bool:
        """Whether any row has an image prompt."""
        return any(self.rows)

    @classmethod
    def of_tensors(cls, rows: int, together: Sequence[EqualLengthRows]) -> RowImagePrompts:
        """Build one for this many rows from collected rows."""
        return cls(((),) * rows, together=tuple(together))

    def in_tensors(self) -> RowImagePrompts:
        """The same with the rows collected, see :meth:`alike`."""
        return replace(self, together=tuple(self.alike()))

    def of(self, rows: Sequence[int]) -> RowImagePrompts:
        """Select some rows, which may be repeated."""
        return RowImagePrompts(tuple(self.rows[row] for row in rows), self.fixed)

    def padded(self, count: int, *, fixed: bool) -> RowImagePrompts:
        """Append rows without image prompts until there are ``count``."""
        missing: tuple[tuple[RowImagePrompt, ...], ...] = ((),) * (count - len(self.rows))
        return RowImagePrompts((*self.rows, *missing), fixed)

    def alike(self) -> Sequence[EqualLengthRows]:
        """Collect the rows by number of tokens, in an order independent of the other rows.

        A row with several image prompts of the same number of tokens appears in as many separate
        collections.
        """
        if self.together:
            return self.together
        found: dict[tuple[int, int], dict[int, RowImagePrompt]] = {}
        for row, own in enumerate(self.rows):
            times: dict[int, int] = {}
            for one in own:
                tokens = len(one.attended)
                again = times[tokens] = times.get(tokens, -1) + 1
                found.setdefault((tokens, again), {})[row] = one
        return [self._together(found[key]) for key in sorted(found)]

    def _together(self, found: dict[int, RowImagePrompt]) -> EqualLengthRows:
        rows, own = list(found), list(found.values())
        filling = len(self.rows) - len(rows) if self.fixed else 0
        attended = torch.stack([one.attended for one in (*own, *own[:1] * filling)])
        where = torch.tensor([*rows, *rows[:1] * filling]).to(attended.device, non_blocking=True)
        scales = torch.tensor([one.scale for one in own], dtype=attended.dtype)
        scales = scales.to(attended.device, non_blocking=True).view(-1, 1, 1)
        return EqualLengthRows(where, attended, where[: len(rows)], scales, _regions(own))


def _regions(own: Sequence[RowImagePrompt]) -> Mapping[int, Tensor] | None:
    """Stack the regions of rows; rows without a region act on the whole image."""
    shape = next((one.region for one in own if one.region is not None), None)
    if shape is None:
        return None
    whole = {queries: torch.ones_like(part) for queries, part in shape.items()}
    regions = [whole if one.region is None else one.region for one in own]
    return {queries: torch.stack([one[queries] for one in regions]) for queries in shape}

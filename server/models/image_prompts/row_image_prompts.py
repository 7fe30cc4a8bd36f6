"""The pictures that stand beside the prompts of a forward's rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["AlikeForm", "AlikeRows", "RowImagePrompt", "RowImagePrompts"]


@dataclass(frozen=True, slots=True, eq=False)
class RowImagePrompt:
    """What a row attends to beside its text.

    Attributes:
        attended: keys and values of all layers, ``[tokens, features]``.
        scale: factor on what is attended to.
        region: further factors, ``[queries, 1]``, by the number of queries of a layer; None for all
            of the image.
    """

    attended: Tensor
    scale: float
    region: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class AlikeForm:
    """What of :class:`AlikeRows` is no tensor: its numbers.

    Attributes:
        rows: over which attention runs.
        onto: rows that have pictures.
        regions: numbers of queries; None where all act on all of the image.
    """

    rows: int
    onto: int
    regions: tuple[int, ...] | None

    def together(self, tensors: Mapping[str, Tensor]) -> AlikeRows:
        """The rows of this form.

        Args:
            tensors: by the names of ``AlikeRows.tensors``.
        """
        rows, attended, onto, scales = (
            tensors[name] for name in ("rows", "attended", "onto", "scales")
        )
        regions = None
        if self.regions is not None:
            regions = {queries: tensors[str(queries)] for queries in self.regions}
        return AlikeRows(rows, attended, onto, scales, regions)


@dataclass(frozen=True, slots=True, eq=False)
class AlikeRows:
    """Rows of a forward that attend to equally many tokens, each once.

    Attributes:
        rows: int64 ``[n]``; where the number of rows is fixed, the first is repeated.
        attended: of these, ``[n, tokens, features]``.
        onto: the rows without those repeated, int64 ``[m]``.
        scales: of these, ``[m, 1, 1]``.
        regions: likewise, ``[m, queries, 1]``, by the number of queries; None where all act on all
            of the image.
    """

    rows: Tensor
    attended: Tensor
    onto: Tensor
    scales: Tensor
    regions: Mapping[int, Tensor] | None

    @property
    def form(self) -> AlikeForm:
        """All but the tensors."""
        regions = None if self.regions is None else tuple(self.regions)
        return AlikeForm(len(self.rows), len(self.onto), regions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; a region has that of its number of queries."""
        regions = {str(queries): part for queries, part in (self.regions or {}).items()}
        return regions | {
            "rows": self.rows,
            "attended": self.attended,
            "onto": self.onto,
            "scales": self.scales,
        }


@dataclass(frozen=True, slots=True, eq=False)
class RowImagePrompts:
    """What the rows of a forward attend to beside their texts.

    Attributes:
        rows: of each row, in order. What is attended to of several pictures is summed.
        fixed: whether attention runs over as many rows as the forward has, so that a row's bits do
            not depend on how many rows have pictures.
        together: the rows by their tokens, where they have been put together already.
    """

    rows: tuple[tuple[RowImagePrompt, ...], ...]
    fixed: bool = False
    together: tuple[AlikeRows, ...] = ()

    def __bool__(self) -> bool:
        """Whether any row has any."""
        return any(self.rows)

    @classmethod
    def of_tensors(cls, rows: int, together: Sequence[AlikeRows]) -> RowImagePrompts:
        """Those of so many rows, which have been put together."""
        return cls(((),) * rows, together=tuple(together))

    def in_tensors(self) -> RowImagePrompts:
        """The same with the rows put together, see :meth:`alike`."""
        return replace(self, together=tuple(self.alike()))

    def of(self, rows: Sequence[int]) -> RowImagePrompts:
        """Those of some rows, which may be repeated."""
        return RowImagePrompts(tuple(self.rows[row] for row in rows), self.fixed)

    def padded(self, count: int, *, fixed: bool) -> RowImagePrompts:
        """The same, followed by rows without any until there are ``count``."""
        missing: tuple[tuple[RowImagePrompt, ...], ...] = ((),) * (count - len(self.rows))
        return RowImagePrompts((*self.rows, *missing), fixed)

    def alike(self) -> Sequence[AlikeRows]:
        """The rows by their tokens, in an order in which no row's company has a say.

        A row that has several pictures of equally many tokens is there as often, each time apart.
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

    def _together(self, found: dict[int, RowImagePrompt]) -> AlikeRows:
        rows, own = list(found), list(found.values())
        filling = len(self.rows) - len(rows) if self.fixed else 0
        attended = torch.stack([one.attended for one in (*own, *own[:1] * filling)])
        where = torch.tensor([*rows, *rows[:1] * filling]).to(attended.device, non_blocking=True)
        scales = torch.tensor([one.scale for one in own], dtype=attended.dtype)
        scales = scales.to(attended.device, non_blocking=True).view(-1, 1, 1)
        return AlikeRows(where, attended, where[: len(rows)], scales, _regions(own))


def _regions(own: Sequence[RowImagePrompt]) -> Mapping[int, Tensor] | None:
    """The regions of rows of one size together; those without act on all of the image."""
    shape = next((one.region for one in own if one.region is not None), None)
    if shape is None:
        return None
    whole = {queries: torch.ones_like(part) for queries, part in shape.items()}
    regions = [whole if one.region is None else one.region for one in own]
    return {queries: torch.stack([one[queries] for one in regions]) for queries in shape}

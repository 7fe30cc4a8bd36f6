"""The ControlNets that act on the rows of a forward, and what they add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from server.models.controls.control import Control

__all__ = ["RowControl", "RowControls", "SameControl", "summed"]


@dataclass(frozen=True, slots=True, eq=False)
class RowControl:
    """A ControlNet that acts on a row.

    Attributes:
        control: the ControlNet.
        hint: what it reads of its picture, as the model's ``control_hint`` made it.
        scale: factor on what it adds.
    """

    control: Control
    hint: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class SameControl:
    """Rows of a forward that one ControlNet acts on, each once.

    Attributes:
        control: the ControlNet.
        rows: their positions; where the number of rows is fixed, the first is repeated.
        hints: ``[rows, ...]``.
        scales: factors on what is added, one a row; repeated rows have none.
    """

    control: Control
    rows: Sequence[int]
    hints: Tensor
    scales: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class RowControls:
    """The ControlNets that act on the rows of a forward.

    Attributes:
        rows: of each row, in order. What several add is summed.
        fixed: whether a ControlNet runs over as many rows as the forward has, so that a row's bits
            do not depend on how many rows have it.
    """

    rows: tuple[tuple[RowControl, ...], ...]
    fixed: bool = False

    def __bool__(self) -> bool:
        """Whether any acts on any row."""
        return any(self.rows)

    def of(self, rows: Sequence[int]) -> RowControls:
        """Those of some rows, which may be repeated."""
        return replace(self, rows=tuple(self.rows[row] for row in rows))

    def padded(self, count: int, *, fixed: bool) -> RowControls:
        """The same, followed by rows without ControlNets until there are ``count``."""
        missing: tuple[tuple[RowControl, ...], ...] = ((),) * (count - len(self.rows))
        return RowControls((*self.rows, *missing), fixed=fixed)

    def by_control(self) -> list[SameControl]:
        """The rows of each ControlNet, in an order in which no row's company has a say.

        A row that has the same ControlNet twice, with two pictures, is among its rows twice, and
        the second time apart from the first.
        """
        found: dict[tuple[str, int, int], dict[int, RowControl]] = {}
        for row, own in enumerate(self.rows):
            times: dict[Control, int] = {}
            for one in own:
                again = times[one.control] = times.get(one.control, -1) + 1
                key = one.control.name, again, id(one.control)
                found.setdefault(key, {})[row] = one
        return [self._together(found[key]) for key in sorted(found)]

    def _together(self, found: dict[int, RowControl]) -> SameControl:
        rows, own = list(found), list(found.values())
        hints = [one.hint for one in own]
        missing = len(self.rows) - len(rows) if self.fixed else 0
        return SameControl(
            own[0].control,
            [*rows, *[rows[0]] * missing],
            torch.stack([*hints, *[hints[0]] * missing]),
            [one.scale for one in own],
        )


def summed(
    controls: RowControls, evaluate: Callable[[SameControl, Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """What all ControlNets of a forward add to its rows.

    Args:
        controls: of all rows, at least one of which has any.
        evaluate: runs a ControlNet over its rows, whose positions it is given as int64 on the
            device too, and returns what it adds to them at each place, ``[rows, ...]``.

    Returns:
        What is added to all rows at each place, ``[all rows, ...]``; 0 where nothing is.
    """
    sums: list[Tensor] = []
    for same in controls.by_control():
        device = same.hints.device
        rows = torch.tensor(same.rows).to(device, non_blocking=True)
        count = len(same.scales)
        scales = torch.tensor(same.scales, dtype=torch.float32).to(device, non_blocking=True)
        residuals = evaluate(same, rows)
        if not sums:
            sums = [one.new_zeros(len(controls.rows), *one.shape[1:]) for one in residuals]
        for total, one in zip(sums, residuals, strict=True):
            factors = scales.view(-1, *[1] * (one.ndim - 1))
            # A place of a row has one summand of each ControlNet, so no order of sums is open.
            total.index_add_(0, rows[:count], (one[:count] * factors).to(total.dtype))
    return sums

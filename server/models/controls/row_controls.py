"""The ControlNets that act on the rows of a forward, and what they add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from weakref import ref

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from server.models.controls.control import Control

__all__ = ["ControlForm", "RowControl", "RowControls", "SameControl", "summed"]

FADE: Final = 0.825
"""Factor of a place of the network on that of the next one, where a ControlNet gives way."""

LAST: Final = 12
"""The place whose factor is 1: the middle of Stable Diffusion 1.x. Both as sd-webui-controlnet
(scripts/hook.py), which takes the first ten of these factors for Stable Diffusion XL."""


@dataclass(frozen=True, slots=True, eq=False)
class RowControl:
    """A ControlNet that acts on a row.

    Attributes:
        control: the ControlNet.
        hint: what it reads of its picture, see ``ControlKind.hint``.
        scale: factor on what it adds.
        gives_way: whether it adds less, the nearer a place is to the network's input.
    """

    control: Control
    hint: Tensor
    scale: float
    gives_way: bool = False


@dataclass(frozen=True, slots=True)
class ControlForm:
    """What of :class:`SameControl` is no tensor, and its numbers of rows.

    Attributes:
        control: the ControlNet, which is not kept alive.
        rows: that it runs over.
        onto: rows that it acts on.
    """

    control: ref[Control]
    rows: int
    onto: int

    def together(self, tensors: Mapping[str, Tensor]) -> SameControl | None:
        """The rows of this form; None where the ControlNet is there no more.

        Args:
            tensors: by the names of ``SameControl.tensors``.
        """
        control = self.control()
        return None if control is None else SameControl(control, **tensors)


@dataclass(frozen=True, slots=True, eq=False)
class SameControl:
    """Rows of a forward that one ControlNet acts on, each once.

    Attributes:
        control: the ControlNet.
        rows: those that it runs over, int64; where the number of rows is fixed, the first is
            repeated.
        hints: of these, ``[rows, ...]``.
        onto: the rows that it acts on, int64 ``[n]``.
        run: which of ``rows`` gives what is added to each of them, int64 ``[n]``.
        scales: the factor on it, float32 ``[n]``.
        fades: of each, the factor of a place on that of the next one, float32 ``[n]``; None where
            all places are alike.
    """

    control: Control
    rows: Tensor
    hints: Tensor
    onto: Tensor
    run: Tensor
    scales: Tensor
    fades: Tensor | None = None

    @property
    def form(self) -> ControlForm:
        """All but the tensors."""
        return ControlForm(ref(self.control), len(self.rows), len(self.onto))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {
            "rows": self.rows,
            "hints": self.hints,
            "onto": self.onto,
            "run": self.run,
            "scales": self.scales,
        }
        return found if self.fades is None else found | {"fades": self.fades}

    def factors(self, place: int) -> Tensor:
        """The factors on what is added at a place, counted from 0."""
        return self.scales if self.fades is None else self.scales * self.fades ** (LAST - place)


@dataclass(frozen=True, slots=True, eq=False)
class RowControls:
    """The ControlNets that act on the rows of a forward.

    Attributes:
        rows: of each row, in order. What several add is summed.
        prompts: for each row, the row of its image that is told the prompt; it has the same
            ControlNets.
        fixed: whether a ControlNet runs over as many rows as the forward has, so that a row's bits
            do not depend on how many rows have it.
        together: the rows of each ControlNet, where they have been put together already.
    """

    rows: tuple[tuple[RowControl, ...], ...]
    prompts: tuple[int, ...]
    fixed: bool = False
    together: tuple[SameControl, ...] = ()

    def __bool__(self) -> bool:
        """Whether any acts on any row."""
        return any(self.rows)

    @classmethod
    def of_tensors(cls, rows: int, together: Sequence[SameControl]) -> RowControls:
        """Those of so many rows, which have been put together."""
        return cls(((),) * rows, tuple(range(rows)), together=tuple(together))

    def in_tensors(self, *, once: bool) -> RowControls:
        """The same with the rows of each ControlNet put together, see :meth:`by_control`."""
        return replace(self, together=tuple(self.by_control(once=once)))

    def of(self, rows: Sequence[int]) -> RowControls:
        """Those of some rows, which may be repeated."""
        places: dict[int, int] = {}
        for place, row in enumerate(rows):
            places.setdefault(row, place)
        return RowControls(
            tuple(self.rows[row] for row in rows),
            # Where the prompt's row stays behind, a row stands for it by itself.
            tuple(places.get(self.prompts[row], places[row]) for row in rows),
            self.fixed,
        )

    def padded(self, count: int, *, fixed: bool) -> RowControls:
        """The same, followed by rows without ControlNets until there are ``count``."""
        here = len(self.rows)
        missing: tuple[tuple[RowControl, ...], ...] = ((),) * (count - here)
        return RowControls((*self.rows, *missing), (*self.prompts, *range(here, count)), fixed)

    def by_control(self, *, once: bool) -> Sequence[SameControl]:
        """The rows of each ControlNet, in an order in which no row's company has a say.

        A row that has the same ControlNet twice, with two pictures, is among its rows twice, and
        the second time apart from the first.

        Args:
            once: run a ControlNet over the prompt's row of an image alone, for all of its rows.
        """
        if self.together:
            return self.together
        found: dict[tuple[str, int, int], dict[int, RowControl]] = {}
        for row, own in enumerate(self.rows):
            times: dict[Control, int] = {}
            for one in own:
                again = times[one.control] = times.get(one.control, -1) + 1
                key = one.control.name, again, id(one.control)
                found.setdefault(key, {})[row] = one
        return [self._together(found[key], once=once) for key in sorted(found)]

    def _together(self, found: dict[int, RowControl], *, once: bool) -> SameControl:
        runs = {row: self.prompts[row] if once else row for row in found}
        rows = list(dict.fromkeys(runs.values()))
        places = {row: place for place, row in enumerate(rows)}
        missing = len(self.rows) - len(rows) if self.fixed else 0
        filled = [*rows, *[rows[0]] * missing]
        hints = torch.stack([found[row].hint for row in filled])

        def sent(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(hints.device, non_blocking=True)

        fades = [FADE if one.gives_way else 1.0 for one in found.values()]
        return SameControl(
            found[rows[0]].control,
            sent(filled, torch.int64),
            hints,
            sent(list(found), torch.int64),
            sent([places[run] for run in runs.values()], torch.int64),
            sent([one.scale for one in found.values()], torch.float32),
            sent(fades, torch.float32) if FADE in fades else None,
        )


def summed(
    controls: RowControls,
    evaluate: Callable[[SameControl], Sequence[Tensor | None]],
    *,
    once: bool,
) -> list[Tensor | None]:
    """What all ControlNets of a forward add to its rows.

    Args:
        controls: of all rows, at least one of which has any.
        evaluate: runs a ControlNet over its rows, and returns what it adds at each place of the
            network, ``[rows, ...]``. Places may have the same tensor, or none.
        once: see ``RowControls.by_control``.

    Returns:
        What is added to all rows at each place, ``[all rows, ...]``; 0 for rows without, and None
        where nothing is added to any. Places to which the same is added have the same tensor.
    """
    each = controls.by_control(once=once)
    found = [evaluate(same) for same in each]
    fading = any(same.fades is not None for same in each)
    sums: dict[tuple[int, ...], Tensor | None] = {}
    places: list[Tensor | None] = []
    for place, residuals in enumerate(zip(*found, strict=True)):
        key = (*map(id, residuals), place if fading else 0)
        if key not in sums:
            sums[key] = _sum(len(controls.rows), each, residuals, place)
        places.append(sums[key])
    return places


def _sum(
    count: int, each: Sequence[SameControl], residuals: Sequence[Tensor | None], place: int
) -> Tensor | None:
    """What ControlNets add to ``count`` rows at one place."""
    total: Tensor | None = None
    for same, residual in zip(each, residuals, strict=True):
        if residual is None:
            continue
        if total is None:
            total = residual.new_zeros(count, *residual.shape[1:])
        factors = same.factors(place).view(-1, *[1] * (residual.ndim - 1))
        added = (residual.index_select(0, same.run) * factors).to(total.dtype)
        # No row is there twice, so no order of sums is open.
        total.index_add_(0, same.onto, added)
    return total

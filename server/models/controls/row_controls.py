"""The ControlNets that act on the rows of a forward pass, and the residuals that they add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from weakref import ref

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from server.models.controls.control import Control

__all__ = ["ControlForm", "ControlGroup", "RowControl", "RowControls", "summed"]

FADE: Final = 0.825
"""Factor by which a ControlNet that gives way to the prompt adds less at each earlier place."""

LAST: Final = 12
"""The place whose factor is 1: the middle block of Stable Diffusion 1.x. Both constants are those
of sd-webui-controlnet (scripts/hook.py), which takes the first ten of these factors for Stable
Diffusion XL."""


@dataclass(frozen=True, slots=True, eq=False)
class RowControl:
    """A ControlNet that acts on a row.

    Attributes:
        control: the ControlNet.
        hint: its preprocessed image, see ``ControlKind.hint``.
        scale: factor on the residuals.
        gives_way: whether it adds less the nearer a place is to the network's input.
    """

    control: Control
    hint: Tensor
    scale: float
    gives_way: bool = False


@dataclass(frozen=True, slots=True)
class ControlForm:
    """The non-tensor parts of :class:`ControlGroup`, and its numbers of rows.

    Attributes:
        control: weak reference to the ControlNet.
        rows: number of rows that it runs over.
        onto: number of rows that it acts on.
    """

    control: ref[Control]
    rows: int
    onto: int

    def together(self, tensors: Mapping[str, Tensor]) -> ControlGroup | None:
        """Rebuild the :class:`ControlGroup` of this form; None if the ControlNet no longer exists.

        Args:
            tensors: tensors by the names in ``SameControl.tensors``.
        """
        control = self.control()
        return None if control is None else ControlGroup(control, **tensors)


@dataclass(frozen=True, slots=True, eq=False)
class ControlGroup:
    """The rows of a forward pass that one ControlNet acts on, each once.

    Attributes:
        control: the ControlNet.
        rows: indices of the rows that it runs over, int64; padded with the first one where the
            number of rows is fixed.
        hints: preprocessed images of these rows, ``[rows, ...]``.
        onto: indices of the rows that it acts on, int64 ``[n]``.
        run: for each of them, the index into ``rows`` whose residuals are added, int64 ``[n]``.
        scales: for each of them, the factor on the residuals, float32 ``[n]``.
        fades: for each of them, the ratio of the factor at a place to that at the next place,
            float32 ``[n]``; None where the factor is the same at all places.
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
        """Everything except the tensors."""
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
        """Factors on the residuals at a place of the network, counted from 0."""
        return self.scales if self.fades is None else self.scales * self.fades ** (LAST - place)


@dataclass(frozen=True, slots=True, eq=False)
class RowControls:
    """The ControlNets that act on the rows of a forward pass.

    Attributes:
        rows: ControlNets of each row, in order. The residuals of several are summed.
        prompts: for each row, the row of the same image that is conditioned on the prompt; it has
            the same ControlNets.
        fixed: whether a ControlNet runs over as many rows as the forward pass has, so that a row's
            bits do not depend on how many rows use the ControlNet.
        together: the rows of each ControlNet, if they have been collected already.
    """

    rows: tuple[tuple[RowControl, ...], ...]
    prompts: tuple[int, ...]
    fixed: bool = False
    together: tuple[ControlGroup, ...] = ()

    def __bool__(self) -> bool:
        """Whether any ControlNet acts on any row."""
        return any(self.rows)

    @classmethod
    def of_tensors(cls, rows: int, together: Sequence[ControlGroup]) -> RowControls:
        """Build one for this many rows from the collected rows of each ControlNet."""
        return cls(((),) * rows, tuple(range(rows)), together=tuple(together))

    def in_tensors(self, *, once: bool) -> RowControls:
        """The same with the rows of each ControlNet collected, see :meth:`by_control`."""
        return replace(self, together=tuple(self.by_control(once=once)))

    def of(self, rows: Sequence[int]) -> RowControls:
        """Select some rows, which may be repeated."""
        places: dict[int, int] = {}
        for place, row in enumerate(rows):
            places.setdefault(row, place)
        return RowControls(
            tuple(self.rows[row] for row in rows),
            # If the prompt's row is not selected, a row stands in for it.
            tuple(places.get(self.prompts[row], places[row]) for row in rows),
            self.fixed,
        )

    def padded(self, count: int, *, fixed: bool) -> RowControls:
        """Append rows without ControlNets until there are ``count``."""
        here = len(self.rows)
        missing: tuple[tuple[RowControl, ...], ...] = ((),) * (count - here)
        return RowControls((*self.rows, *missing), (*self.prompts, *range(here, count)), fixed)

    def by_control(self, *, once: bool) -> Sequence[ControlGroup]:
        """Collect the rows of each ControlNet, in an order independent of the other rows.

        A row that uses the same ControlNet twice, with two images, appears in two separate
        collections of this ControlNet.

        Args:
            once: run a ControlNet only over an image's row for the prompt, for all of its rows.
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

    def _together(self, found: dict[int, RowControl], *, once: bool) -> ControlGroup:
        runs = {row: self.prompts[row] if once else row for row in found}
        rows = list(dict.fromkeys(runs.values()))
        places = {row: place for place, row in enumerate(rows)}
        missing = len(self.rows) - len(rows) if self.fixed else 0
        filled = [*rows, *[rows[0]] * missing]
        hints = torch.stack([found[row].hint for row in filled])

        def sent(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(hints.device, non_blocking=True)

        fades = [FADE if one.gives_way else 1.0 for one in found.values()]
        return ControlGroup(
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
    evaluate: Callable[[ControlGroup], Sequence[Tensor | None]],
    *,
    once: bool,
) -> list[Tensor | None]:
    """Sum the residuals of all ControlNets of a forward pass.

    Args:
        controls: ControlNets of all rows; at least one row has one.
        evaluate: runs a ControlNet over its rows, and returns its residual at each place of the
            network, ``[rows, ...]``. Several places may share a tensor; None adds nothing.
        once: see ``RowControls.by_control``.

    Returns:
        The sum for all rows at each place, ``[all rows, ...]``; 0 for rows without ControlNets,
        and None where nothing is added to any row. Places with the same sum share a tensor.
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
    count: int, each: Sequence[ControlGroup], residuals: Sequence[Tensor | None], place: int
) -> Tensor | None:
    """Sum the residuals of ControlNets for ``count`` rows at one place."""
    total: Tensor | None = None
    for same, residual in zip(each, residuals, strict=True):
        if residual is None:
            continue
        if total is None:
            total = residual.new_zeros(count, *residual.shape[1:])
        factors = same.factors(place).view(-1, *[1] * (residual.ndim - 1))
        added = (residual.index_select(0, same.run) * factors).to(total.dtype)
        # No row appears twice in ``onto``, so the order of summation is determined.
        total.index_add_(0, same.onto, added)
    return total

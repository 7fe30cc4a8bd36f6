"""Selects the rows of a forward pass that adapters change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["AdaptedRows", "Sent", "for_any_forward", "passes", "sender", "where"]

Sent: TypeAlias = "Callable[[tuple[Any, ...]], Tensor]"
"""Returns numbers as a tensor on the device of a network."""


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedRows:
    """Some rows of a forward pass, in runs of rows with the same changes.

    Attributes:
        where: None for all rows; a slice for adjacent rows; otherwise their positions, int64 on
            the device, followed by any number of repetitions of the first one.
        count: number of rows, without repetitions.
        run: number of rows for each entry of a stack.
    """

    where: slice | Tensor | None
    count: int
    run: int

    def of(self, tensor: Tensor) -> Tensor:
        """Select these rows of a tensor of all rows."""
        if self.where is None:
            return tensor
        if isinstance(self.where, slice):
            return tensor[self.where]
        return tensor.index_select(0, self.where)


def where(positions: Sequence[int], total: int, sent: Sent) -> slice | Tensor | None:
    """Select rows for ``AdaptedRows.where``.

    Args:
        positions: positions of the rows, ascending.
        total: number of rows of the forward pass.
        sent: see :func:`sender`.
    """
    first, count = positions[0], len(positions)
    if count == total:
        return None
    if positions[-1] - first == count - 1:
        return slice(first, first + count)
    return sent(tuple(positions))


def passes(tensor: Tensor, rows: int) -> list[Tensor]:
    """Split a tensor into batches of all rows, of which a network may concatenate several.

    Qwen-Image-Edit computes two modulations of each row at once, its own and that of its images.

    Args:
        tensor: input or output of a layer.
        rows: number of rows of the forward pass.
    """
    if len(tensor) == rows:
        return [tensor]
    return [tensor[i : i + rows] for i in range(0, len(tensor), rows)]


def sender(device: torch.device) -> Sent:
    """A function that copies numbers to a device, and equal numbers only once."""

    @cache
    def sent(numbers: tuple[Any, ...]) -> Tensor:
        with for_any_forward():
            return torch.tensor(numbers).to(device, non_blocking=True)

    return sent


def for_any_forward() -> AbstractContextManager[None]:
    """Lets forward passes that are differentiated read the tensors that are created inside."""
    return torch.inference_mode(mode=False)

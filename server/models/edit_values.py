"""Edits of the rows of a forward pass inside the network, split into numbers and places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from guidance.edits import ApartFrom, Edit

__all__ = ["EditPlaces", "EditValues"]


@dataclass(frozen=True, slots=True)
class EditPlaces:
    """Where and how rows change the network, without the numbers.

    Attributes:
        numbers: kind of each edit and where in the network it acts; any of the rows may use it.
        apart: rows that move away from others: the block's name, the row, and its edit.
    """

    numbers: tuple[tuple[type[Edit], str], ...]
    apart: tuple[tuple[str, int, ApartFrom], ...]

    @property
    def kinds(self) -> set[str]:
        """Names of the kinds of edits."""
        return {kind.__name__ for kind, _ in self.numbers} | {
            type(edit).__name__ for *_, edit in self.apart
        }


@dataclass(frozen=True, slots=True, eq=False)
class EditValues:
    """The edits of a forward pass's rows, on the network's device.

    Attributes:
        places: where they act.
        numbers: number of each row at each place, ``[rows, places]`` float32; a neutral value where
            the row has no such edit.
    """

    places: EditPlaces
    numbers: Tensor

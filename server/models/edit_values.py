"""What the rows of a forward change inside a network, taken apart into numbers and places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from guidance.edits import ApartFrom, Edit

__all__ = ["EditPlaces", "EditValues"]


@dataclass(frozen=True, slots=True)
class EditPlaces:
    """Where rows change the network, and how, but for the numbers.

    Attributes:
        numbers: kind of each edit and where in the network it acts; any of the rows may make it.
        apart: the rows that move away from others: the block's name, the row, and its edit.
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
    """The edits of a forward's rows on the network's device.

    Attributes:
        places: where they act.
        numbers: of each row at each of these places, ``[rows, places]`` float32; one that leaves
            the network as it is where the row makes no such edit.
    """

    places: EditPlaces
    numbers: Tensor

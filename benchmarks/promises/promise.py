"""A promise and its measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from benchmarks.real_server import Served

__all__ = ["WEAK", "Measure", "Outcome", "Promise"]

WEAK: Final = ("-m", "benchmarks.promises.weak")
"""Arguments to Python for the server without its defenses."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a measurement.

    Attributes:
        figure: the figure in words, with its unit.
        kept: whether the figure is within the target.
        endless: whether the measurement did not end in time.
    """

    figure: str
    kept: bool
    endless: bool = False


Measure: TypeAlias = Callable[[Served], Outcome]


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the table.

    Attributes:
        claim: what is promised.
        method: how it is measured.
        target: the figure that keeps the promise.
        weakness: what is removed from the server for the negative control.
        measure: the measurement; on the weakened server it must find the promise broken.
        control: the measurement for the negative control, where that does not use the weakened
            server.
    """

    claim: str
    method: str
    target: str
    weakness: str
    measure: Measure
    control: Measure | None = None

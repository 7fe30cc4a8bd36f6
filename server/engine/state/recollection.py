"""What a step cache keeps of one image beside its latents in the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FIRST_OUTPUT", "INPUT", "Recollection"]

INPUT, FIRST_OUTPUT = 0, 1
"""Slots of the pool's cache memory: the network's input at the last stage that was evaluated, and
from the second on its outputs there, by the number of the prediction; both as a network has them
that predicts the velocity."""


@dataclass(slots=True, eq=False)
class Recollection:
    """Of the last stage of an image that was evaluated; empty for an image without a step cache.

    Attributes:
        predictions: numbers of those that were evaluated there.
        inside: what changed the network there, as :attr:`Sequence.inside` has it.
        numbers: the cache's own, ``[n]``; None before the first evaluation.
        recalls: whether the next stage recalls these predictions and evaluates none.
        saved: evaluations that were recalled so far.
    """

    predictions: frozenset[int] = frozenset()
    inside: tuple[tuple[int, ...], ...] = ()
    numbers: Tensor | None = None
    recalls: bool = False
    saved: int = 0

"""What a step cache keeps of one image, apart from latents in the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FIRST_OUTPUT", "INPUT", "LastEvaluation"]

INPUT, FIRST_OUTPUT = 0, 1
"""Slots of the pool's cache memory: the input at the last evaluated stage, and from the second on
its outputs for each prediction, both expressed as those of a network that predicts the velocity."""


@dataclass(slots=True, eq=False)
class LastEvaluation:
    """The last evaluated stage of an image; empty for an image without a step cache.

    Attributes:
        predictions: numbers of the predictions that were evaluated there.
        inside: what changed the network there, see :attr:`Sequence.inside`.
        numbers: numbers of the cache itself, ``[n]``; None before the first evaluation.
        recalls: whether the next stage recalls these predictions and evaluates none.
        saved: number of evaluations that were recalled so far.
    """

    predictions: frozenset[int] = frozenset()
    inside: tuple[tuple[int, ...], ...] = ()
    numbers: Tensor | None = None
    recalls: bool = False
    saved: int = 0

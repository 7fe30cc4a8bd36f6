"""Which of a ControlNet's residuals goes to which layer of the network."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["in_runs", "in_turn", "stretched"]


def in_runs(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """The first for as many layers as each must serve, then the second, and so on.

    Args:
        residuals: of the ControlNet, no more than ``layers``; empty where it has none.
        layers: of the network.
    """
    if not residuals:
        return [None] * layers
    each = ceil(layers / len(residuals))
    return [residuals[layer // each] for layer in range(layers)]


def in_turn(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """The first for the first layer, the second for the second, and again from the first."""
    if not residuals:
        return [None] * layers
    return [residuals[layer % len(residuals)] for layer in range(layers)]


def stretched(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """Each for as many layers as any other, give or take one.

    Args:
        residuals: of the ControlNet, at least one and no more than ``layers``.
        layers: of the network.
    """
    each = layers / len(residuals)
    return [residuals[int(layer / each)] for layer in range(layers)]

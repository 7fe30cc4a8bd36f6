"""Assigns a ControlNet's residuals to the layers of the network."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["in_runs", "in_turn", "stretched"]


def in_runs(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """Assign each residual to a run of consecutive layers of equal length, the last run the rest.

    Args:
        residuals: residuals of the ControlNet, no more than ``layers``; empty where it has none.
        layers: number of layers of the network.
    """
    if not residuals:
        return [None] * layers
    each = ceil(layers / len(residuals))
    return [residuals[layer // each] for layer in range(layers)]


def in_turn(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """Assign the residuals to the layers cyclically, starting again after the last residual."""
    if not residuals:
        return [None] * layers
    return [residuals[layer % len(residuals)] for layer in range(layers)]


def stretched(residuals: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """Assign each residual to a run of consecutive layers whose lengths differ by at most one.

    Args:
        residuals: residuals of the ControlNet, at least one and no more than ``layers``.
        layers: number of layers of the network.
    """
    each = layers / len(residuals)
    return [residuals[int(layer / each)] for layer in range(layers)]

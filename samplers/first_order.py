"""The exact step with the denoised prediction held: what every solver here is built upon."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


def first_order(grid: Grid, i: int, x: F64, denoised: F64, sigma_next: float | None = None) -> F64:
    """From point i to i + 1: ``x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D``.

    DDIM, DPM-Solver-1 and Euler in ``x / alpha`` are all this (arXiv 2211.01095, section 3). Not
    written through the log-SNR, so it stays finite at pure noise and at the clean end.

    Args:
        grid: the points.
        i: index of the point that x lies at.
        x: the state, as a row over a plan's columns.
        denoised: the prediction, likewise.
        sigma_next: noise scale to land on where fresh noise will make up the rest; default the
            grid's own.
    """
    ratio = (grid.sigma[i + 1] if sigma_next is None else sigma_next) / grid.sigma[i]
    return ratio * x + (grid.alpha[i + 1] - grid.alpha[i] * ratio) * denoised


def direct_gain(grid: Grid, i: int) -> float:
    """The weight of the denoised prediction in that step: ``alpha' (1 - e^(-h))``."""
    return float(grid.alpha[i + 1] - grid.alpha[i] * grid.sigma[i + 1] / grid.sigma[i])

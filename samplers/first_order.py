"""The exact step for a constant denoised prediction, on which the solvers here are built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


def first_order(grid: Grid, i: int, x: F64, denoised: F64, sigma_next: float | None = None) -> F64:
    """Step from point i to i + 1: ``x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D``.

    DDIM, DPM-Solver-1 and Euler's method in ``x / alpha`` are all this step (arXiv 2211.01095,
    section 3). It is written without the log-SNR, so it stays finite at pure noise and at the
    clean end.

    Args:
        grid: the points of the run.
        i: index of the point where x lies.
        x: the state, as a row over the columns of a plan's tables.
        denoised: the prediction, likewise.
        sigma_next: sigma to land on, where fresh noise will make up the rest; by default that of
            the grid.
    """
    ratio = (grid.sigma[i + 1] if sigma_next is None else sigma_next) / grid.sigma[i]
    return ratio * x + (grid.alpha[i + 1] - grid.alpha[i] * ratio) * denoised


def direct_gain(grid: Grid, i: int) -> float:
    """The weight of the denoised prediction in :func:`first_order`: ``alpha' (1 - e^(-h))``."""
    return float(grid.alpha[i + 1] - grid.alpha[i] * grid.sigma[i + 1] / grid.sigma[i])

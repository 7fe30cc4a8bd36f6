"""Velocity space, in which flow-matching and v-prediction networks predict."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from guidance.rule import Rows


def velocity_share(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The coefficient c of x in a velocity: ``sigma v = c x - D``.

    Along a path, ``v = (d alpha / d sigma) x0 + eps`` up to a factor, which gives
    ``c = 1 / (alpha - sigma d alpha / d sigma)``. That is alpha where ``alpha^2 + sigma^2 = 1``
    (v as in arXiv 2202.00512), and 1 for flow matching and where alpha is 1. The kind of path is
    inferred from the level. A level that fits two kinds has the same c in both, except for pure
    noise without any signal, which is treated as flow matching.

    Args:
        alpha: signal scale, any shape.
        sigma: noise scale, same shape.
    """
    off_circle = (alpha.square() + sigma.square() - 1).abs()
    off_line = (alpha + sigma - 1).abs()
    return alpha.where(off_circle < off_line, 1)


def velocity(rows: Rows, denoised: Tensor) -> Tensor:
    """``sigma v`` of a denoised prediction at the rows' points, ``[rows, C, h, w]``, float64.

    The same formula converts back, as ``D = c x - sigma v``.

    Args:
        rows: rows with x, alpha and sigma.
        denoised: denoised prediction, ``[rows, C, h, w]``; or a velocity times sigma, to convert
            back.
    """
    share = velocity_share(rows.alpha, rows.sigma).double()
    return share * rows.x.double() - denoised.double()

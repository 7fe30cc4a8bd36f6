"""The Langevin corrector of Score SDE: the only stage that is not a fixed matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def corrected(columns: Tensor, langevin: Tensor) -> Tensor:
    """Move x along its score and by fresh noise, at a constant noise level.

    ``x' = x + e score + sqrt(2 e) z`` with ``e = 2 (snr |z| / |score|)^2`` and
    ``score = (alpha D - x) / sigma^2`` (Song et al., arXiv 2011.13456, algorithms 4 and 5).
    With ``n = x - alpha D`` and ``q = snr sigma |z| / |n|`` this is
    ``x' = x - 2 q^2 n + 2 q sigma z``, which avoids a division by a small sigma.

    Norms are taken per row. The published code takes the mean of the norms over its batch, which
    would make a result depend on the other rows.

    Args:
        columns: ``[rows, K + 2, C, h, w]``: the state's slots (x first), D and z.
        langevin: snr, alpha and sigma, ``[rows, 3]``. Where the snr or the score is 0, x does not
            change.

    Returns:
        Columns of the same shape, with x moved.
    """
    x, denoised, noise = columns[:, 0], columns[:, -2], columns[:, -1]
    snr, alpha, sigma = (scalar.view(-1, *[1] * (x.ndim - 1)) for scalar in langevin.unbind(1))
    away = x - alpha * denoised
    length = _norm(away)
    q = (snr * sigma * _norm(noise) / length).where(length > 0, 0)
    moved = columns.clone()
    moved[:, 0] = x + 2 * q * (sigma * noise - q * away)
    return moved


def _norm(x: Tensor) -> Tensor:
    """The norm of each row, shaped to broadcast over it."""
    return x.reshape(len(x), -1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))

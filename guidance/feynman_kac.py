"""Feynman-Kac correctors: particles weighted so that they sample the intended distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from guidance.reductions import inner

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class FeynmanKac(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Feynman-Kac correctors for guidance (Skreta et al., arXiv 2503.02819).

    Classifier-free guidance steps along ``s = (1 - w) s_u + w s_c``, but this does not sample
    ``p_u^(1 - w) p_c^w``, because that product does not diffuse as its factors do. Each path needs
    a weight to correct this: the images of a request are treated as particles, and after every step
    but the last they are resampled, so that some are replaced by copies of others according to
    their weights.

    Valid for steps with the noise of the reverse diffusion, and for ``cfg`` evaluated at every
    step. Costs no evaluation. Copies share their past, so pictures of one request resemble each
    other more than independent ones would.
    """

    summary: ClassVar[str] = (
        "Weights and resamples the images of a request; removes the bias of guidance."
    )
    source: ClassVar[str] = "Skreta et al., arXiv 2503.02819, on geometric averages."
    name: Literal["fkc"] = "fkc"
    bound: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description=(
            "The log weights of a step, minus their mean, are clipped to plus and minus this "
            "value. A large value is exact, but few images then have descendants."
        ),
    )

    def weights(self, increments: NDArray[np.float64]) -> NDArray[np.float64]:
        """Normalized weights of the particles after one step, summing to 1, ``[particles]``.

        Args:
            increments: increments of the log-weights in this step, ``[particles]``. A particle
                whose increment is not finite has weight 0; if none is finite all weights are equal.
        """
        finite = np.isfinite(increments)
        if not finite.any():
            return np.full(len(increments), 1 / len(increments))
        centred = increments[finite] - increments[finite].mean()
        centred = np.clip(centred, -self.bound, self.bound)
        shares = np.zeros(len(increments))
        shares[finite] = np.exp(centred - centred.max())
        return shares / shares.sum()


def increments(cond: Tensor, other: Tensor, scale: float, snr: float, snr_next: float) -> Tensor:
    """Increments of the log-weights in a step from one level to the next, float64 ``[rows]``.

    The paper's rate is ``w (w - 1) (g^2 / 2) |s_c - s_u|^2 |dt|``. In any schedule
    ``g^2 |s_c - s_u|^2 |dt| = |Dc - Du|^2 d(alpha^2 / sigma^2)``, so for predictions that are
    constant over the step the increment is ``w (w - 1) / 2 |Dc - Du|^2 (snr' - snr)``. That is also
    exactly the ratio ``K_u^(1 - w) K_c^w / K_w`` of the Gaussians that one ancestral step samples,
    which makes it far better at few steps than the Euler rule of the authors' code.

    Args:
        cond: denoised predictions for the prompt, ``[rows, C, h, w]``.
        other: denoised predictions that guidance moves away from, of the same shape.
        scale: w, the guidance scale.
        snr: ``(alpha / sigma)^2`` at the predictions; 0 at pure noise.
        snr_next: ``(alpha / sigma)^2`` at the end of the step; finite.
    """
    apart = cond - other
    return inner(apart, apart).flatten() * (scale * (scale - 1) / 2 * (snr_next - snr))


def ancestors(weights: NDArray[np.float64], uniform: float) -> list[int]:
    """Systematic resampling: the index of the particle that each one continues from.

    Of n particles, one with weight s has ``floor(n s)`` or ``ceil(n s)`` descendants, ``n s`` on
    average. Survivors keep their index, and further copies take those of the others.

    Args:
        weights: normalized weights of the particles, ``[particles]``.
        uniform: uniform random number in [0, 1).
    """
    count = len(weights)
    edges = np.cumsum(weights)
    # Rounding must not move a draw beyond the last particle with a weight above 0.
    draws = np.minimum((uniform + np.arange(count)) / count, np.nextafter(1, 0))
    drawn = np.searchsorted(edges / edges[-1], draws, side="right")
    heirs = np.bincount(drawn, minlength=count)
    origins = np.arange(count)
    origins[heirs == 0] = np.repeat(np.arange(count), np.maximum(heirs - 1, 0))
    return origins.tolist()


def effective(weights: NDArray[np.float64]) -> float:
    """Effective number of particles, ``1 / sum of squared weights``: from 1 to their number."""
    return float(1 / np.square(weights).sum())

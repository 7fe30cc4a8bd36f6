"""Inversion: from a picture back to the noise that generates it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class RunPoints(Protocol):
    """The points of a run, noisiest first; ``samplers.Grid`` is one."""

    @property
    def t(self) -> NDArray[np.floating]:
        """Times that the network is given, ``[N + 1]``."""
        ...

    @property
    def alpha(self) -> NDArray[np.floating]:
        """Signal scales, ``[N + 1]``."""
        ...

    @property
    def sigma(self) -> NDArray[np.floating]:
        """Noise scales, ``[N + 1]``; the last may be 0."""
        ...


def invert(
    denoise: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    x: Tensor,
    points: RunPoints,
    *,
    scale: float,
    rule: Literal["cfg_plus_plus", "cfg"] = "cfg_plus_plus",
    corrections: int = 0,
) -> Tensor:
    """DDIM inversion under guidance (Chung et al., arXiv 2406.08070).

    From a cleaner level (alpha', sigma') to (alpha, sigma), with the guided noise
    ``eps_l = eps_u + scale (eps_c - eps_u)``:

        x0 = (x' - sigma' eps_r) / alpha',   x = alpha x0 + sigma eps_l

    where eps_r is the noise with which the picture was renoised: eps_u under CFG++, eps_l under
    CFG. DDIM steps under the same rule return to the picture, up to the change of the noises from
    x' to x: the noises at x are needed but, x being unknown, they are evaluated at x', with the
    time of x. Each correction evaluates them again at the x found, so that with enough corrections
    the inversion is exact where this iteration converges.

    Args:
        denoise: ``(x, t) -> (for the prompt, for the negative prompt)``, denoised predictions of
            the shape of x; t is one of the points' times.
        x: state at the end of the run, ``[rows, ...]``.
        points: points of that run.
        scale: scale of the rule.
        rule: guidance rule of the run.
        corrections: number of further evaluations at each step, at least 0.

    Returns:
        The state at the start of the run, of the shape of ``x``.

    Raises:
        ValueError: corrections is negative.
    """
    if corrections < 0:
        raise ValueError(f"corrections is {corrections}; it must be at least 0.")
    for i in reversed(range(len(points.t) - 1)):
        alpha, sigma = float(points.alpha[i]), float(points.sigma[i])
        alpha_from, sigma_from = float(points.alpha[i + 1]), float(points.sigma[i + 1])
        found = x
        for _ in range(1 + corrections):
            cond, other = ((found - alpha * D) / sigma for D in denoise(found, float(points.t[i])))
            guided = other + scale * (cond - other)
            renoised = other if rule == "cfg_plus_plus" else guided
            found = alpha * (x - sigma_from * renoised) / alpha_from + sigma * guided
        x = found
    return x

"""From a picture back to the noise that makes it."""

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
        """Times that the network is told, ``[N + 1]``."""
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

    where the picture was renoised by eps_r: eps_u under CFG++, eps_l under CFG. DDIM steps under
    the same rule come back to the picture, up to what the noises change from x' to x: they are
    wanted at x and, as that is sought, taken at x', with the time of x. Each correction takes them
    anew at the x found, so that enough of them make the inversion exact where this converges.

    Args:
        denoise: ``(x, t) -> (for the prompt, for the negative prompt)``, denoised predictions of
            the shape of x; t is one of the points' times.
        x: where the run ended, ``[rows, ...]``.
        points: of that run.
        scale: of the rule.
        rule: what the run was guided by.
        corrections: further evaluations at each step.

    Returns:
        Where the run began, as ``x``.

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

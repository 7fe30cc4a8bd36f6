"""The positions of a run's stages in the diffusion that the model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionLevels:
    """Levels for terms whose strength depends on the position in the diffusion, each ``[stages]``.

    Attributes:
        alpha: signal scale.
        sigma: noise scale.
        time: fraction of the diffusion's time, 0 at the clean picture and 1 at noise.
        variance: variance of the noise that a trained step adds at this level, relative to its
            maximum, in (0, 1].
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    time: NDArray[np.float64]
    variance: NDArray[np.float64]

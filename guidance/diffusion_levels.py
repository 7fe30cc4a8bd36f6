"""Where the stages of a run stand in the diffusion that the model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionLevels:
    """What terms need to know whose strength follows the diffusion, each ``[stages]``.

    Attributes:
        alpha: signal scale.
        sigma: noise scale.
        time: share of the diffusion's time, 0 at the clean picture and 1 at noise.
        variance: of the noise that a trained step adds there, over the largest there is, in (0, 1].
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    time: NDArray[np.float64]
    variance: NDArray[np.float64]

"""Guidance at every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from guidance.policy import Policy

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Always(Policy, frozen=True):
    """Evaluates the rule's branches at every stage."""

    summary: ClassVar[str] = "Evaluates the second prediction at every step."
    source: ClassVar[str] = "Ho and Salimans, arXiv 2207.12598."
    skips: ClassVar[bool] = False
    name: Literal["always"] = "always"

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return np.ones(len(noise_ratio), np.bool_)

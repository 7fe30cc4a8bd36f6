"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.policy import Policy
from guidance.window import Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Interval(Window, Policy, frozen=True):
    """Guidance only between two noise levels, and between two fractions of the steps.

    Kynkäänniemi et al. (arXiv 2404.07724): guidance is harmful at high noise and has no effect at
    low noise. Outside the interval only the prompt's prediction is used.
    """

    summary: ClassVar[str] = "Guides only between two noise levels; cheaper, and more varied."
    source: ClassVar[str] = "Kynkäänniemi et al., arXiv 2404.07724, equation 5."
    name: Literal["interval"] = "interval"
    low: float = Field(
        default=0.28, ge=0, description="Lowest sigma / alpha that is guided, exclusive."
    )
    high: float | None = Field(
        default=5.42,
        gt=0,
        description="Highest sigma / alpha that is guided, inclusive; null is no bound.",
    )

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return self.contains(noise_ratio, progress)

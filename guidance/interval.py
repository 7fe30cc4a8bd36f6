"""Guidance in a limited interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from guidance.policy import Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Interval(Policy, frozen=True):
    """Guidance between two noise levels, and between two shares of the steps.

    Kynkäänniemi et al. (arXiv 2404.07724): guidance harms at high noise and does nothing at low
    noise. Outside the interval the prompt's prediction is used alone.
    """

    summary: ClassVar[str] = "Guides between two noise levels only; cheaper and more varied."
    source: ClassVar[str] = "Kynkäänniemi et al., arXiv 2404.07724, equation 5."
    name: Literal["interval"] = "interval"
    low: float = Field(default=0.28, ge=0, description="Least sigma / alpha guided, exclusive.")
    high: float = Field(default=5.42, gt=0, description="Greatest sigma / alpha guided, inclusive.")
    start: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the steps done when it opens."
    )
    stop: float = Field(
        default=1.0, gt=0, le=1, description="Share of the steps done when it closes."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be below high")
        if self.start >= self.stop:
            raise ValueError(
                f"start is {self.start:g} and stop {self.stop:g}; start must be below stop"
            )
        return self

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        by_noise = (noise_ratio > self.low) & (noise_ratio <= self.high)
        return by_noise & (progress >= self.start) & (progress < self.stop)

"""A window of a run: a range of noise levels and a range of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Window(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """The range of noise levels and steps in which something acts; everywhere by default."""

    low: float = Field(
        default=0.0, ge=0, description="Lowest sigma / alpha at which it acts, exclusive."
    )
    high: float | None = Field(
        default=None,
        gt=0,
        description="Highest sigma / alpha at which it acts, inclusive; null is no bound.",
    )
    start: float = Field(
        default=0.0, ge=0, lt=1, description="Fraction of the steps after which it starts to act."
    )
    stop: float = Field(
        default=1.0, gt=0, le=1, description="Fraction of the steps after which it stops acting."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high is not None and self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be below high")
        if self.start >= self.stop:
            raise ValueError(
                f"start is {self.start:g} and stop {self.stop:g}; start must be below stop"
            )
        return self

    def contains(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which stages lie inside the window, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: fraction of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        high = np.inf if self.high is None else self.high
        by_noise = (noise_ratio > self.low) & (noise_ratio <= high)
        return by_noise & (progress >= self.start) & (progress < self.stop)

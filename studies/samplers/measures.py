"""Measures of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def relative_errors(x: Tensor, reference: Tensor) -> list[float]:
    """RMSE of each image divided by the RMS of its reference, both ``[images, C, h, w]``."""
    apart, size = ((y.flatten(1) ** 2).mean(1).sqrt() for y in (x - reference, reference))
    return (apart / size).tolist()


@dataclass(frozen=True, slots=True)
class Bounds:
    """The range of clean latents, per channel.

    Attributes:
        low: low quantile of each channel.
        high: corresponding high quantile of each channel.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, latents: Tensor, tail: float) -> Bounds:
        """The range with a fraction ``tail`` of values below and above; ``[images, C, h, w]``."""
        values = latents.movedim(1, 0).flatten(1).double().numpy()
        low, high = np.quantile(values, [tail, 1 - tail], axis=1)
        return cls(tuple(low.tolist()), tuple(high.tolist()))

    def beyond(self, latents: Tensor) -> list[float]:
        """Fraction of each image's elements that lie outside the range or are NaN."""
        low, high = (latents.new_tensor(bound).view(1, -1, 1, 1) for bound in (self.low, self.high))
        outside = ~((latents >= low) & (latents <= high))
        return outside.flatten(1).to(torch.float32).mean(1).tolist()


def slope(counts: Sequence[int], errors: Sequence[float]) -> float:
    """The power of 1 / count with which errors decrease, by least squares on logarithms."""
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])

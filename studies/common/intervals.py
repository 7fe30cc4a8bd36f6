"""Means, proportions and ratios with their confidence intervals."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers.levels import F64

DEVIATIONS = 1.96
"""Number of standard deviations that bound 95 % of a normal distribution."""


def mean_and_error(values: Sequence[float] | F64) -> tuple[float, float]:
    """The mean and its standard error; the error of a single value is nan."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return float(found.mean()), float("nan")
    return float(found.mean()), float(found.std(ddof=1) / sqrt(len(found)))


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    z = DEVIATIONS
    center = (right + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * sqrt(right * (of - right) / of + z * z / 4)
    return center - half, center + half


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean over images of ``ours / theirs``, and its 95 % interval: a paired comparison.

    The interval is the standard error of the logarithms times :data:`DEVIATIONS`; both sides must
    be for the same images.
    """
    logs = np.log(np.asarray(ours, np.float64) / np.asarray(theirs, np.float64))
    middle, error = mean_and_error(logs)
    low, high = middle - DEVIATIONS * error, middle + DEVIATIONS * error
    return float(np.exp(middle)), float(np.exp(low)), float(np.exp(high))

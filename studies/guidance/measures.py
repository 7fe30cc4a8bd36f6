"""Measures of images and latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from samplers.levels import F64

LUMA = (0.2126, 0.7152, 0.0722)
BEYOND = 0.05
"""Distance outside [-1, 1] from which a decoded value counts as clipped: 2.5 % of the range."""
RESAMPLES = 200
MAX_PSNR = 99.0


def saturation(pictures: Tensor) -> list[float]:
    """Mean over pixels of the largest minus the smallest channel, in [0, 1].

    This is the chroma of HSV, its saturation times its value, so that dark pixels, whose saturation
    is dominated by rounding, contribute nothing.

    Args:
        pictures: pictures, ``[images, 3, H, W]`` in [-1, 1].
    """
    shown = _shown(pictures)
    return (shown.amax(1) - shown.amin(1)).flatten(1).mean(1).tolist()


def contrast(pictures: Tensor) -> list[float]:
    """Standard deviation of luma, in [0, .5], of ``[images, 3, H, W]`` in [-1, 1]."""
    weights = pictures.new_tensor(LUMA).view(1, 3, 1, 1)
    return (_shown(pictures) * weights).sum(1).flatten(1).std(1).tolist()


def clipped(pictures: Tensor) -> list[float]:
    """Fraction of each picture's values that lie well outside [-1, 1] and are clipped."""
    return (pictures.abs() > 1 + BEYOND).flatten(1).to(torch.float32).mean(1).tolist()


def _shown(pictures: Tensor) -> Tensor:
    return (pictures / 2 + 0.5).clamp(0, 1)


def psnr(pictures: Tensor, wanted: Tensor) -> list[float]:
    """PSNR of each picture as shown, in decibels, at most :data:`MAX_PSNR`."""
    error = (_shown(pictures) - _shown(wanted)).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=MAX_PSNR).tolist()


def features(latents: Tensor) -> F64:
    """Features for the Fréchet distance, ``[images, 5 C]``.

    They are each channel's means over the four quarters of the picture and its standard deviation:
    few enough that their covariance can be estimated from few images.
    """
    quarters = F.adaptive_avg_pool2d(latents, 2).flatten(1)
    deviations = latents.flatten(2).std(2)
    return torch.cat([quarters, deviations], 1).double().numpy()


def frechet(found: F64, wanted: F64) -> float:
    """Squared Fréchet distance of normal distributions fitted to two sets ``[images, features]``.

    Features are in units of the second set's standard deviations.
    """
    scale = wanted.std(0)
    a, b = found / scale, wanted / scale
    apart = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0))
    return float(apart @ apart + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def beyond(found: F64, true: F64, wanted: F64) -> tuple[float, float]:
    """By how much one set is farther away than another for the same captions, with its deviation.

    The standard deviation is over bootstrap resamples of the captions, which are the same for both
    sets, so that the effect of the choice of captions cancels.

    Args:
        found: features of drawn pictures.
        true: features of the true pictures of the same captions, in the same order.
        wanted: features of the set that both are compared with.
    """
    random = np.random.default_rng(0)
    draws = [random.integers(len(found), size=len(found)) for _ in range(RESAMPLES)]
    gaps = [frechet(found[draw], wanted) - frechet(true[draw], wanted) for draw in draws]
    return frechet(found, wanted) - frechet(true, wanted), float(np.std(gaps, ddof=1))


def distances(one: Tensor, other: Tensor) -> list[float]:
    """Root mean square difference of each pair of latents, both ``[pairs, C, h, w]``."""
    return (one - other).square().flatten(1).mean(1).sqrt().tolist()


def apart(latents: Tensor) -> float:
    """Mean of :func:`distances` over all pairs of ``[images, C, h, w]``."""
    one, other = torch.combinations(torch.arange(len(latents))).unbind(1)
    return float(np.mean(distances(latents[one], latents[other])))


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of two means over the same images, and its 95 % interval (bootstrap over images)."""
    pairs = np.stack([np.asarray(ours, np.float64), np.asarray(theirs, np.float64)])
    random = np.random.default_rng(0)
    draws = random.integers(pairs.shape[1], size=(10 * RESAMPLES, pairs.shape[1]))
    means = pairs[:, draws].mean(2)
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float(pairs[0].mean() / pairs[1].mean()), float(low), float(high)

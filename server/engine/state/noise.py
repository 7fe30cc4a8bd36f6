"""Noise that depends only on an image's seeds and the stage, never on the batch."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SINE = 1e-6
"""Sine of the angle between two noises below which they count as parallel, with no arc between."""


class Variation(NamedTuple):
    """Another seed towards whose noise the start noise is turned, and how far, from 0 to 1."""

    seed: int
    strength: float


def start_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the unit noise that a run starts from, float32 on the CPU.

    It is what ``torch.Generator("cpu").manual_seed(seed)`` draws first, so the same seed starts
    diffusers' pipelines from the same latents.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def varied_noise(
    seed: int,
    shape: tuple[int, int, int],
    variation: Variation | None = None,
    inner: tuple[int, int, int] | None = None,
) -> Tensor:
    """Draw the unit noise of a run, with AUTOMATIC1111's variations (its modules/rng.py).

    Args:
        seed: seed of the image.
        shape: shape of the result, ``(C, h, w)``.
        variation: turns the noise towards that of another seed.
        inner: shape whose noise fills the middle of the result; the rest is the noise of ``shape``.
    """
    size = inner or shape
    noise = start_noise(seed, size)
    if variation is not None:
        noise = _between(noise, start_noise(variation.seed, size), variation.strength)
    return noise if size == shape else _in_the_middle(noise, start_noise(seed, shape))


def stage_noise(seed: int, stage: int, shape: tuple[int, ...]) -> Tensor:
    """Draw fresh unit noise of one stage, float32 on the CPU."""
    mixed = _mixed(f"{seed}:{stage}") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


def stage_uniform(seed: int, stage: int) -> float:
    """Draw one number of a stage, in [0, 1), independent of the stage's noise."""
    return (_mixed(f"{seed}:{stage}:uniform") >> 11) / 2**53


def _between(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two noises ``[C, h, w]``.

    As in AUTOMATIC1111, each column of a channel is turned separately. This keeps the variance of
    unit noise, which linear interpolation would reduce.
    """
    cosine = F.cosine_similarity(noise, other, dim=1, eps=0).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    sine = angle.sin()
    turned = ((1 - share) * angle).sin() / sine * noise + (share * angle).sin() / sine * other
    return torch.where(sine > MIN_SINE, turned, torch.lerp(noise, other, share))


def _in_the_middle(inner: Tensor, outer: Tensor) -> Tensor:
    """Put the inner noise into the middle of the outer one ``[C, h, w]``, as far as it fits."""
    rows, own_rows = _overlap(outer.shape[1], inner.shape[1])
    columns, own_columns = _overlap(outer.shape[2], inner.shape[2])
    result = outer.clone()
    result[:, rows, columns] = inner[:, own_rows, own_columns]
    return result


def _overlap(outer: int, inner: int) -> tuple[slice, slice]:
    """Slices along one side: where the inner noise goes, and the part of it that goes there."""
    margin = (outer - inner) // 2
    if margin >= 0:
        return slice(margin, margin + inner), slice(None)
    room = inner + 2 * margin
    return slice(room), slice(-margin, room - margin)


def _mixed(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")

"""Noise that depends on an image's seeds and the stage alone, never on the batch."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SINE = 1e-6
"""Of the angle between noises that are parallel, of which there is no arc between."""


class Variation(NamedTuple):
    """Another seed whose noise the start noise is turned towards, and how far, from 0 to 1."""

    seed: int
    strength: float


def start_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Unit noise that a run starts from, float32 on the CPU.

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
    """Unit noise that a run starts from, with AUTOMATIC1111's variations (its modules/rng.py).

    Args:
        seed: of the image.
        shape: of the result, ``(C, h, w)``.
        variation: turns the noise towards that of another seed.
        inner: a shape whose noise the middle of the result has; the rest is that of ``shape``.
    """
    size = inner or shape
    noise = start_noise(seed, size)
    if variation is not None:
        noise = _between(noise, start_noise(variation.seed, size), variation.strength)
    return noise if size == shape else _in_the_middle(noise, start_noise(seed, shape))


def stage_noise(seed: int, stage: int, shape: tuple[int, ...]) -> Tensor:
    """Fresh unit noise of one stage, float32 on the CPU."""
    mixed = _mixed(f"{seed}:{stage}") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


def stage_uniform(seed: int, stage: int) -> float:
    """One number of a stage, in [0, 1), which has nothing to do with its noise."""
    return (_mixed(f"{seed}:{stage}:uniform") >> 11) / 2**53


def _between(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two noises ``[C, h, w]``.

    Each column of a channel is turned by itself, as there. That keeps the variance of unit noise,
    which a straight line between two noises would lose.
    """
    cosine = F.cosine_similarity(noise, other, dim=1, eps=0).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    sine = angle.sin()
    turned = ((1 - share) * angle).sin() / sine * noise + (share * angle).sin() / sine * other
    return torch.where(sine > LEAST_SINE, turned, torch.lerp(noise, other, share))


def _in_the_middle(inner: Tensor, outer: Tensor) -> Tensor:
    """The outer noise ``[C, h, w]`` with the inner one in its middle, as much as there is room."""
    rows, own_rows = _overlap(outer.shape[1], inner.shape[1])
    columns, own_columns = _overlap(outer.shape[2], inner.shape[2])
    result = outer.clone()
    result[:, rows, columns] = inner[:, own_rows, own_columns]
    return result


def _overlap(outer: int, inner: int) -> tuple[slice, slice]:
    """Where along one side the inner noise goes, and which part of it."""
    margin = (outer - inner) // 2
    if margin >= 0:
        return slice(margin, margin + inner), slice(None)
    room = inner + 2 * margin
    return slice(room), slice(-margin, room - margin)


def _mixed(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")

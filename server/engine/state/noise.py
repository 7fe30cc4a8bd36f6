"""Noise that depends on an image's seed and the stage alone, never on the batch."""

from __future__ import annotations

from hashlib import blake2b

import torch


def start_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise that a run starts from, float32 on the CPU.

    It is what ``torch.Generator("cpu").manual_seed(seed)`` draws first, so the same seed starts
    diffusers' pipelines from the same latents.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stage_noise(seed: int, stage: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Fresh unit noise of one stage, float32 on the CPU."""
    mixed = _mixed(f"{seed}:{stage}") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


def stage_uniform(seed: int, stage: int) -> float:
    """One number of a stage, in [0, 1), which has nothing to do with its noise."""
    return (_mixed(f"{seed}:{stage}:uniform") >> 11) / 2**53


def _mixed(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")

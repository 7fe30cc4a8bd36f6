"""Rotary positions of networks of Qwen-Image's kind."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["keep_own_positions"]

SIZES_KEPT = 32
"""Sizes of pictures whose positions are kept, 2 MB each at 1024 x 1024 pixels."""


def keep_own_positions(network: Any) -> None:
    """Let a network keep its positions itself.

    Diffusers caches them by class, which would keep them of networks that are let go of.
    """
    positions = network.pos_embed
    for name in ("_get_device_freqs", "_compute_video_freqs"):
        method = getattr(type(positions), name).__wrapped__.__get__(positions)
        setattr(positions, name, lru_cache(SIZES_KEPT)(method))

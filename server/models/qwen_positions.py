"""Position caches for the rotary embeddings of Qwen-Image networks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["cache_positions_per_network"]

MAX_CACHED_SIZES = 32
"""Number of image sizes whose positions are cached, 2 MB each at 1024 x 1024 pixels."""


def cache_positions_per_network(network: Any) -> None:
    """Let a network cache its positions per instance.

    diffusers caches them per class, which would keep those of networks that have been unloaded.
    """
    positions = network.pos_embed
    for name in ("_get_device_freqs", "_compute_video_freqs"):
        method = getattr(type(positions), name).__wrapped__.__get__(positions)
        setattr(positions, name, lru_cache(MAX_CACHED_SIZES)(method))

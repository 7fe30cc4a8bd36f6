"""The result of an image that is returned as clean latents instead of pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from server.engine.state.sequence import ImageResult, Sequence

__all__ = ["undecoded"]


def undecoded(sequence: Sequence) -> ImageResult:
    """Make the result of an image whose slot 0 is its clean latents; waits for the device."""
    latents = sequence.lane.pool.columns[sequence.slot, 0].to("cpu", copy=True)
    return sequence.result(np.empty((0, 0, 3), dtype=np.uint8), latents)

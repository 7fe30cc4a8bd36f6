"""Frames for live streams: a disc that moves over a shaded background, with optional pauses."""

from __future__ import annotations

from itertools import count
from math import cos, sin
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

STEP = 0.25
"""Movement of the disc from one frame to the next, in radians of its orbit."""

SPELL = 15
"""Number of frames after which the disc stops or resumes."""

GRAIN = 2.0
"""Standard deviation of a camera's noise, in levels of 255."""


def clip(side: int, *, seed: int, pauses: bool = False) -> Iterator[NDArray[np.uint8]]:
    """An endless sequence of frames, uint8 ``[side, side, 3]``.

    Args:
        side: width and height in pixels.
        seed: seed of color, orbit and noise.
        pauses: whether the disc stands still for every second group of 15 frames; the camera's
            noise continues.
    """
    random = np.random.default_rng(seed)
    color = random.uniform(40, 255, 3)
    y, x = np.mgrid[:side, :side] / side
    ground = np.repeat(60 + 120 * y[..., None], 3, 2)
    angle = random.uniform(0, 6)
    for number in count():
        if not pauses or number // SPELL % 2 == 0:
            angle += STEP
        inside = np.hypot(x - 0.5 - 0.25 * cos(angle), y - 0.5 - 0.25 * sin(angle)) < 0.18
        frame = np.where(inside[..., None], color, ground)
        grainy = frame + random.normal(0, GRAIN, frame.shape)
        yield grainy.clip(0, 255).astype(np.uint8)

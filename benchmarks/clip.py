"""Frames for live streams: a disc that moves over a shaded ground, and stands still at times."""

from __future__ import annotations

from itertools import count
from math import cos, sin
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

STEP = 0.25
"""How far the disc goes from one frame to the next, in radians of its orbit."""

SPELL = 15
"""Frames after which it stands still or goes on."""

GRAIN = 2.0
"""Standard deviation of a camera's noise, in levels of 255."""


def clip(side: int, *, seed: int, pauses: bool = False) -> Iterator[NDArray[np.uint8]]:
    """Endless frames, uint8 ``[side, side, 3]``.

    Args:
        side: width and height in pixels.
        seed: of colour, orbit and noise.
        pauses: whether the disc stands still in every second spell of 15 frames; the camera's
            noise goes on.
    """
    random = np.random.default_rng(seed)
    colour = random.uniform(40, 255, 3)
    y, x = np.mgrid[:side, :side] / side
    ground = np.repeat(60 + 120 * y[..., None], 3, 2)
    angle = random.uniform(0, 6)
    for number in count():
        if not pauses or number // SPELL % 2 == 0:
            angle += STEP
        inside = np.hypot(x - 0.5 - 0.25 * cos(angle), y - 0.5 - 0.25 * sin(angle)) < 0.18
        frame = np.where(inside[..., None], colour, ground)
        grainy = frame + random.normal(0, GRAIN, frame.shape)
        yield grainy.clip(0, 255).astype(np.uint8)

"""The files of empirical model statistics in a model folder, by guidance scale."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from samplers.statistics import Statistics, read_identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from samplers.levels import F64

Kept = Literal["", "elementwise", "per channel", "one number", "smoothed", "noise prediction"]
"""What of the statistics a contender is given; empty where it takes none."""

HALF_WINDOW = 3
"""Points to either side that smoothed statistics are averaged over."""


class Missing(Exception):
    """A cell needs what does not exist (yet): a sampler, or statistics of a guidance scale."""


@dataclass(frozen=True, slots=True)
class StatisticsFiles:
    """Statistics of one model, one file a guidance rule and scale.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    def find(self, kept: Kept, scale: float, shape: tuple[int, int, int]) -> Statistics | None:
        """What of the statistics at this scale is kept; None where nothing is wanted.

        Raises:
            Missing: there is no file of the scale.
        """
        if not kept:
            return None
        return _KEPT[kept](Statistics.load(self._path(scale)).for_shape(shape))

    def name_of(self, kept: Kept, scale: float) -> str:
        """What tells these statistics from others of the scale; empty where none are wanted.

        Raises:
            Missing: there is no file of the scale.
        """
        if not kept:
            return ""
        path = self._path(scale)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        identity = read_identity(path)
        return digest if identity is None else f"{identity.points}x{identity.samples}-{digest}"

    def _path(self, scale: float) -> Path:
        wanted = ("none", 1.0) if scale == 1 else ("cfg", scale)
        for path in sorted(self.folder.glob("ems-*.safetensors")):
            identity = read_identity(path)
            if identity is not None and (identity.rule, identity.scale) == wanted:
                return path
        raise Missing(f"there are no statistics of guidance scale {scale:g} in {self.folder}")


def _one_number(found: Statistics) -> Statistics:
    """The mean over all elements, a number a point."""
    return _mapped(found, lambda a: a.mean(axis=(1, 2, 3), keepdims=True))


def _smoothed(found: Statistics) -> Statistics:
    """A moving average over the points."""
    width = 2 * HALF_WINDOW + 1
    edges = ((HALF_WINDOW, HALF_WINDOW), (0, 0), (0, 0), (0, 0))

    def average(a: F64) -> F64:
        padded = np.pad(a, edges, mode="edge")
        return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(-1)

    return _mapped(found, average)


def _noise_prediction(found: Statistics) -> Statistics:
    """(l, s, b) = (0, -1, 0): DPM-Solver in the noise prediction, whatever the model."""
    zero = np.zeros_like(found.l[:, :1, :1, :1])
    return replace(found, l=zero, s=zero - 1, b=zero)


def _mapped(found: Statistics, change: Callable[[F64], F64]) -> Statistics:
    return replace(found, l=change(found.l), s=change(found.s), b=change(found.b))


_KEPT: dict[Kept, Callable[[Statistics], Statistics]] = {
    "elementwise": lambda found: found,
    "per channel": Statistics.per_channel,
    "one number": _one_number,
    "smoothed": _smoothed,
    "noise prediction": _noise_prediction,
}

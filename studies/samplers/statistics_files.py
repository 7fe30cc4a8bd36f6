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
"""The part of the statistics that a contender is given; empty if it uses none."""

HALF_WINDOW = 3
"""Number of points to either side over which smoothed statistics are averaged."""


class Missing(Exception):
    """A cell needs a sampler, or statistics for a guidance scale, that does not exist (yet)."""


@dataclass(frozen=True, slots=True)
class StatisticsFiles:
    """Statistics of one model, with one file per guidance rule and scale.

    Attributes:
        folder: folder of the files.
    """

    folder: Path

    def find(self, kept: Kept, scale: float, shape: tuple[int, int, int]) -> Statistics | None:
        """The requested part of the statistics for a scale; None if none is requested.

        Raises:
            Missing: there is no file for the scale.
        """
        if not kept:
            return None
        return _KEPT[kept](Statistics.load(self._path(scale)).for_shape(shape))

    def name_of(self, kept: Kept, scale: float) -> str:
        """Identifier of the statistics for a scale; empty if none are requested.

        Raises:
            Missing: there is no file for the scale.
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
    """The mean over all elements: one number per point."""
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
    """(l, s, b) = (0, -1, 0), which is DPM-Solver in the noise prediction for any model."""
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

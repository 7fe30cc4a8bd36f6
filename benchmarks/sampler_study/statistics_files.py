"""The files of empirical model statistics beside a model, by guidance scale."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samplers.statistics import Statistics, read_identity

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.sampler_study.cells import Kept


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
        found = Statistics.load(self._path(scale))
        return found.per_channel() if kept == "per channel" else found.for_shape(shape)

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

"""The empirical model statistics in a model folder."""

from __future__ import annotations

import logging
from math import log
from typing import TYPE_CHECKING

from samplers import Statistics
from samplers.statistics import read_identity, schedule_fingerprint
from server.errors import InvalidRequest
from server.lru import ByteBoundedLRU
from server.models.folder import DERIVED, statistics_name, without_folder

if TYPE_CHECKING:
    from pathlib import Path

    from samplers import NoiseSchedule
    from samplers.statistics import StatisticsIdentity

logger = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20
MIN_SCALE = 1e-3
"""Lower bound of scales where distances are taken in the logarithm, which 0 does not have."""


class ModelStatistics:
    """Finds the guidance for which there are statistics, and loads the statistics on demand.

    Headers are read at startup, arrays on first use. Files for other weights or another schedule
    are ignored with a warning.
    """

    def __init__(self) -> None:
        self._files: dict[StatisticsIdentity, Path] = {}
        self._stale: dict[str, str] = {}
        self._arrays: ByteBoundedLRU[Path, Statistics] = ByteBoundedLRU(CACHE_BYTES, _bytes_of)

    @classmethod
    def of(cls, folder: Path, revision: str, schedule: NoiseSchedule) -> ModelStatistics:
        """Find the statistics in a model folder.

        Args:
            folder: model folder.
            revision: revision of its weights.
            schedule: noise schedule of the model.
        """
        found = cls()
        for file in sorted((folder / DERIVED).glob("ems-*.safetensors")):
            try:
                identity = read_identity(file)
                if identity is None:
                    raise ValueError(f"statistics file {file.name!r} belongs to no model.")
                identity.check(revision, schedule_fingerprint(schedule))
            except ValueError as error:
                logger.warning("%s is left out: %s", file, error)
                found._stale[file.name] = without_folder(error, file)
            else:
                found._files[identity] = file
        return found

    @property
    def available(self) -> tuple[str, ...]:
        """Guidance for which there are statistics: "none", "cfg 2", ..."""
        ordered = sorted(self._files, key=lambda identity: identity.scale)
        return tuple(guidance_name(identity.rule, identity.scale) for identity in ordered)

    def exact(self, rule: str, scale: float) -> StatisticsIdentity:
        """The statistics for classifier-free guidance of exactly this scale.

        Args:
            rule: ``cfg`` or ``none``.
            scale: its scale; ``cfg`` of 1 is ``none``.

        Raises:
            InvalidRequest: there are none; the sentence has the command that computes them.
        """
        rule = "none" if scale == 1 else rule
        for identity in self._files:
            if (identity.rule, identity.scale) == (rule, scale):
                return identity
        raise InvalidRequest(
            "sampler.statistics",
            "sampler.statistics is 'exact', but this model has no statistics for guidance "
            f"{guidance_name(rule, scale)!r}{self._why(statistics_name(rule, scale))}; "
            f"compute them with `{_command(rule, scale)}`, or choose {self._instead()}.",
        )

    def nearest(self, scale: float) -> StatisticsIdentity:
        """The statistics with the nearest scale by its logarithm; ``none`` has the scale 1.

        Raises:
            InvalidRequest: there are none for any scale.
        """
        if not self._files:
            raise InvalidRequest(
                "sampler.statistics",
                "sampler.statistics is 'nearest', but this model has no statistics at all"
                f"{self._why(next(iter(self._stale), ''))}; compute them with "
                f"`{_command('cfg', scale)}`, or choose 'none'.",
            )
        return min(self._files, key=lambda identity: _distance(identity.scale, scale))

    def load(self, identity: StatisticsIdentity, shape: tuple[int, ...]) -> Statistics:
        """The arrays for a latent shape: elementwise at their own size, otherwise per channel.

        Raises:
            InvalidRequest: the file no longer exists, or can no longer be read.
        """
        file = self._files[identity]
        try:
            return self._arrays.get(file, lambda: Statistics.load(file)).for_shape(shape)
        except ValueError as error:
            raise InvalidRequest(
                "sampler.statistics",
                f"{without_folder(error, file)} `{_command(identity.rule, identity.scale)}` makes "
                "it again.",
            ) from None

    def refusal(self, guidance: str) -> InvalidRequest:
        """The error for guidance for which exact statistics cannot exist."""
        return InvalidRequest(
            "sampler.statistics",
            f"sampler.statistics is 'exact', but there are no statistics for {guidance}"
            f"{self._why('')}; choose {self._instead()}.",
        )

    def _why(self, file: str) -> str:
        """What is wrong with the suitable file, or which statistics exist; part of a sentence."""
        if file in self._stale:
            return f": {self._stale[file].rstrip('.')}"
        return f", only for {', '.join(self.available)}" if self._files else ""

    def _instead(self) -> str:
        return "'nearest' or 'none'" if self._files else "'none'"


def guidance_name(rule: str, scale: float) -> str:
    """Name of guidance in error sentences and listings: "none", "cfg 4", ..."""
    return rule if rule == "none" else f"{rule} {scale:g}"


def _command(rule: str, scale: float) -> str:
    asked = "--guidance none" if rule == "none" else f"--guidance {rule} --scale {scale:g}"
    return f"weft ems --model FOLDER {asked}"


def _distance(a: float, b: float) -> float:
    return abs(log(max(a, MIN_SCALE)) - log(max(b, MIN_SCALE)))


def _bytes_of(statistics: Statistics) -> int:
    return sum(array.nbytes for array in (statistics.l, statistics.s, statistics.b))

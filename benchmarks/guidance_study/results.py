"""The records, asked for by guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.guidance_study.cells import STEPS
from benchmarks.guidance_study.measures import ratio_of_means
from benchmarks.sampler_study.records import key_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.guidance_study.cells import Sitting
    from benchmarks.sampler_study.records import Records

Record = dict[str, Any]


class Figures:
    """What was measured under one guidance.

    Args:
        blocks: the records by their blocks.
    """

    def __init__(self, blocks: Mapping[int, Record]) -> None:
        self._blocks = dict(sorted(blocks.items()))

    def values(self, name: str) -> list[float]:
        """One figure of every image, over all blocks."""
        return [value for record in self._blocks.values() for value in record.get(name, [])]

    def mean(self, name: str) -> float:
        """Over all images."""
        return float(np.mean(self.values(name)))

    @property
    def right(self) -> tuple[int, int]:
        """Pictures that show all that their caption claims, and all pictures."""
        right = self.values("right")
        return int(sum(right)), len(right)

    @property
    def beyond(self) -> tuple[float, float] | None:
        """Fréchet distance beyond the truth's, and its deviation; None where it was not measured.

        Of the first block alone, so that all are of one size.
        """
        record = self._blocks.get(0, {})
        return (record["beyond"][0], record["beyond"][1]) if "beyond" in record else None

    def changed(self, other: Figures) -> tuple[int, int, int]:
        """Pictures right here and wrong there, the reverse, and all that both have."""
        ours, theirs = self._common(other, "right")
        gained = sum(a > b for a, b in zip(ours, theirs, strict=True))
        lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
        return gained, lost, len(ours)

    def relative(self, other: Figures, name: str) -> tuple[float, float, float]:
        """The mean over that of the other on the same images, and its 95 % interval."""
        return ratio_of_means(*self._common(other, name))

    def _common(self, other: Figures, name: str) -> tuple[list[float], list[float]]:
        shared = [block for block in self._blocks if block in other._blocks]
        ours, theirs = (
            [value for block in shared for value in one._blocks[block][name]]
            for one in (self, other)
        )
        return ours, theirs


class Results:
    """What has been measured; of two results for one cell the later one counts."""

    def __init__(self, records: Records) -> None:
        self._cells: dict[tuple[str, str, int], dict[int, Record]] = {}
        self._others: dict[str, Record] = {}
        for record in records:
            of = record["of"]
            if of["part"] == "pictures":
                place = of["sitting"], key_of(of["guidance"]), of["steps"]
                self._cells.setdefault(place, {})[of["block"]] = record
            else:
                self._others[of["part"]] = record

    def found(
        self, guidance: Mapping[str, Any], sitting: Sitting = "captions", steps: int = STEPS
    ) -> Figures | None:
        """The figures under a guidance; None if it has not been measured."""
        blocks = self._cells.get((sitting, key_of(guidance), steps))
        return None if blocks is None else Figures(blocks)

    @property
    def truth(self) -> Figures | None:
        """The figures of the true pictures."""
        record = self._others.get("truth")
        return None if record is None else Figures({0: record})

    @property
    def true_distance(self) -> float:
        """Fréchet distance of the captions' own true pictures, which every drawing's includes."""
        return self._others["truth"]["frechet"] if "truth" in self._others else float("nan")

    @property
    def rates(self) -> Record | None:
        """What was timed."""
        return self._others.get("rate")

    @property
    def cells(self) -> int:
        """How many were measured."""
        return sum(map(len, self._cells.values()))

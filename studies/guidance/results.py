"""The records, looked up by guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from studies.common.records import key_of
from studies.guidance.cells import BLOCKS, KIND, STEPS, Cell, all_cells
from studies.guidance.measures import ratio_of_means

if TYPE_CHECKING:
    from collections.abc import Mapping

    from studies.common.records import Records
    from studies.guidance.cells import Sitting

Record = dict[str, Any]


class Figures:
    """The figures measured for one guidance.

    Args:
        blocks: records by block.
    """

    def __init__(self, blocks: Mapping[int, Record]) -> None:
        self._blocks = dict(sorted(blocks.items()))

    def values(self, name: str) -> list[float]:
        """A figure of every image, over all blocks."""
        return [value for record in self._blocks.values() for value in record.get(name, [])]

    def mean(self, name: str) -> float:
        """The mean of a figure over all images."""
        return float(np.mean(self.values(name)))

    @property
    def right(self) -> tuple[int, int]:
        """Number of pictures that show all that their caption claims, and of all pictures."""
        right = self.values("right")
        return int(sum(right)), len(right)

    @property
    def beyond(self) -> tuple[float, float] | None:
        """Fréchet distance minus that of the true pictures, and its deviation; None if unmeasured.

        It is the mean over blocks, as only sets of equal size can be compared.
        """
        found = [record["beyond"] for record in self._blocks.values() if "beyond" in record]
        if not found:
            return None
        values, deviations = np.array(found).T
        return float(values.mean()), float(np.sqrt(np.square(deviations).sum()) / len(found))

    @property
    def shares(self) -> list[float]:
        """Fraction of right pictures in each request."""
        return [
            float(share)
            for record in self._blocks.values()
            for share in np.reshape(record["right"], (-1, record["of"].get("each", 1))).mean(1)
        ]

    def attribute(self, *names: str) -> tuple[int, int]:
        """Number of claims about some attributes that pictures meet, and of all such claims."""
        counts = [record["attributes"][name] for record in self._blocks.values() for name in names]
        met, claimed = np.sum(counts, 0)
        return int(met), int(claimed)

    def changed(self, other: Figures) -> tuple[int, int, int]:
        """Number of pictures right only here, right only there, and common to both."""
        ours, theirs = self._common(other, "right")
        gained = sum(a > b for a, b in zip(ours, theirs, strict=True))
        lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
        return gained, lost, len(ours)

    def relative(self, other: Figures, name: str) -> tuple[float, float, float]:
        """Ratio of the mean to that of the other on the same images, with its 95 % interval."""
        return ratio_of_means(*self._common(other, name))

    def _common(self, other: Figures, name: str) -> tuple[list[float], list[float]]:
        shared = [block for block in self._blocks if block in other._blocks]
        ours, theirs = (
            [value for block in shared for value in one._blocks[block][name]]
            for one in (self, other)
        )
        return ours, theirs


class Results:
    """All results; of two results for one cell, the later one is used.

    Attributes:
        rates: record of the timings, if any.
    """

    def __init__(self, records: Records) -> None:
        self._cells: dict[str, dict[int, Record]] = {}
        self._truth: dict[int, Record] = {}
        self.rates: Record | None = None
        for record in records:
            of = record["of"]
            if of["part"] == "pictures":
                place = key_of({key: of[key] for key in KIND if key in of})
                self._cells.setdefault(place, {})[of["block"]] = record
            elif of["part"] == "truth":
                self._truth[of["block"]] = record
            else:
                self.rates = record
        self._leave_out_what_is_not_complete()

    def found(
        self,
        guidance: Mapping[str, Any],
        sitting: Sitting = "captions",
        steps: int = STEPS,
        sampler: Mapping[str, Any] | None = None,
        each: int = 1,
    ) -> Figures | None:
        """The figures for a guidance; None if it has not been measured."""
        cell = Cell(guidance, sitting, steps, sampler=sampler, each=each)
        blocks = self._cells.get(key_of(cell.kind))
        return None if blocks is None else Figures(blocks)

    def _leave_out_what_is_not_complete(self) -> None:
        """Drop incomplete blocks, as the difficulty of captions differs between blocks."""
        for block in range(1, BLOCKS):
            wanted = (key_of(cell.kind) for cell in all_cells() if cell.block == block)
            if not all(block in self._cells.get(place, {}) for place in wanted):
                for blocks in (self._truth, *self._cells.values()):
                    blocks.pop(block, None)

    @property
    def truth(self) -> Figures | None:
        """The figures of the true pictures."""
        return Figures(self._truth) if self._truth else None

    @property
    def true_distance(self) -> float:
        """Fréchet distance of the captions' true pictures, which is the baseline for all others."""
        found = [record["frechet"] for record in self._truth.values()]
        return float(np.mean(found)) if found else float("nan")

    @property
    def captions(self) -> int:
        """Largest number of captions drawn for a cell."""
        sizes = (
            sum(record["of"]["captions"] for record in blocks.values())
            for blocks in self._cells.values()
        )
        return max(sizes, default=0)

    @property
    def cells(self) -> int:
        """Number of measured cells, counting each block of captions."""
        return sum(map(len, self._cells.values()))

    @property
    def images(self) -> int:
        """Number of pictures drawn."""
        blocks = (record for cell in self._cells.values() for record in cell.values())
        return sum(len(record.get("right", record.get("apart", []))) for record in blocks)

"""The records, looked up by what the page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.common.intervals import mean_and_error
from studies.samplers.cells import EVERY, SPACINGS_COMPARED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from studies.common.records import Records


@dataclass(frozen=True, slots=True)
class Found:
    """Errors of one contender in one setting.

    Attributes:
        contender: label of the contender.
        spacing: name of the spacing.
        errors: error of each image.
    """

    contender: str
    spacing: str
    errors: list[float]

    @property
    def mean(self) -> float:
        """Mean error over the images."""
        return mean_and_error(self.errors)[0]


class Results:
    """All results; of two results for one cell, the later one is used."""

    def __init__(self, records: Records) -> None:
        self._cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._others: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            of = record["of"]
            self._others.setdefault(of["part"], []).append(record)
            if of["part"] in ("error", "picture", "spacing"):
                self._cells[_place(of)] = record

    def errors(self, contender: str, spacing: str, evaluations: int, scale: float) -> Found | None:
        """Errors of one contender with one spacing; None if not measured or refused."""
        record = self._cells.get(("error", contender, spacing, evaluations, scale))
        if record is None or "errors" not in record:
            return None
        return Found(contender, spacing, record["errors"])

    def better(self, contender: str, evaluations: int, scale: float) -> Found | None:
        """The errors with the spacing that gives the smaller mean error."""
        found = (self.errors(contender, s, evaluations, scale) for s in SPACINGS_COMPARED)
        return min((f for f in found if f is not None), key=_worth, default=None)

    def ranked(self, contenders: Iterable[str], evaluations: int, scale: float) -> list[Found]:
        """Each contender with its better spacing, the best first."""
        found = (self.better(one, evaluations, scale) for one in contenders)
        return sorted((f for f in found if f is not None), key=_worth)

    def picture(self, contender: str, evaluations: int, scale: float) -> dict[str, Any] | None:
        """The figures of pictures; None if not measured or refused."""
        record = self._cells.get(("picture", contender, "", evaluations, scale))
        return None if record is None or "errors" not in record else record

    def spaced(
        self, contender: str, spacing: str, evaluations: int, scale: float
    ) -> dict[str, Any] | None:
        """Figures of pictures with a spacing; None if not measured or refused."""
        record = self._cells.get(("spacing", contender, spacing, evaluations, scale))
        return None if record is None or "errors" not in record else record

    def of_part(self, part: str) -> Iterator[dict[str, Any]]:
        """All records of a part, in the order in which they were made."""
        yield from self._others.get(part, [])

    def measured(self, part: str) -> list[str]:
        """Labels of the contenders that have a result in a part, in the order of the cells."""
        labels = {
            key[1] for key, record in self._cells.items() if key[0] == part and "errors" in record
        }
        return [label for label in EVERY if label in labels]


def _place(of: dict[str, Any]) -> tuple[Any, ...]:
    return of["part"], of["contender"], of["spacing"], of["evaluations"], of["scale"]


def _worth(found: Found) -> float:
    return found.mean if np.isfinite(found.mean) else float("inf")

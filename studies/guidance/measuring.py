"""Measure what is missing from the records, in order of importance."""

from __future__ import annotations

import os
from itertools import islice
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from server.errors import WeftError
from studies.guidance.cells import BLOCKS, RATED, Cell, all_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from studies.common.records import Records
    from studies.guidance.drawing import Drawing, Spent
    from studies.guidance.sitters import Sitters
    from studies.guidance.study import Sizes, Study

PARTS = ("truth", "pictures", "rate")


class Share(NamedTuple):
    """Every n-th cell from a first one on, so that several processes can share the work."""

    first: int = 0
    every: int = 1


Work = tuple[dict[str, Any], "Callable[[], Mapping[str, Any]]"]


def measure(
    study: Study, records: Records, parts: Collection[str], share: Share, minutes: float
) -> None:
    """Measure until everything is done or the time is up; prints one line per result.

    Args:
        study: the study, which draws and measures.
        records: records that results are added to; existing ones are not measured again.
        parts: parts to measure, from :data:`PARTS`.
        share: selection of the cells.
        minutes: maximum time; a cell that has started is finished.
    """
    ends = perf_counter() + 60 * minutes
    for of, work in _all_work(study, parts, share):
        if of in records:
            continue
        if perf_counter() > ends:
            print("the time is up")
            break
        began = perf_counter()
        try:
            result = work()
        except WeftError as error:
            print(f"not measured: {of['guidance']}: {error}", flush=True)
            continue
        records.add(of, result)
        print(f"{perf_counter() - began:6.1f} s  {summary(of, result)}", flush=True)


def _all_work(study: Study, parts: Collection[str], share: Share) -> Iterator[Work]:
    if "truth" in parts:
        of = {"part": "truth", "weights": study.weights, "captions": study.sizes.captions}
        for block in range(BLOCKS):
            yield {**of, "block": block}, lambda block=block: study.truth(block)
    if "pictures" in parts:
        for cell in islice(all_cells(), share.first, None, share.every):
            yield study.of(cell), lambda cell=cell: study.run(cell)


def measure_rates(
    drawing: Drawing, sitters: Sitters, weights: str, sizes: Sizes, records: Records
) -> None:
    """Time the same requests with each guidance, in turns.

    Args:
        drawing: one engine for all.
        sitters: sitters, of which the first ones are drawn.
        weights: identifier of the model.
        sizes: numbers of images and rounds.
        records: records that the result is added to, unless there is one.
    """
    of = {
        "part": "rate",
        "weights": weights,
        "images": sizes.rated_images,
        "rounds": sizes.rounds,
        "rows": drawing.row_budget,
    }
    if of in records:
        return
    sitting = sitters.of("captions", 0)[: sizes.rated_images]
    # A few images warm everything up and fit the coefficients that policies need.
    for guidance in RATED.values():
        drawing.time(Cell(guidance), sitting[:2])
    rounds: dict[str, list[Spent]] = {name: [] for name in RATED}
    load: list[float] = []
    for _ in range(sizes.rounds):
        for name, guidance in RATED.items():
            load.append(os.getloadavg()[0])
            rounds[name].append(drawing.time(Cell(guidance), sitting))
            print(f"{rounds[name][-1].wall_s:6.1f} s  rate {name}, load {load[-1]:.1f}", flush=True)
    result: dict[str, Any] = {
        "wall_s": {name: [round(one.wall_s, 3) for one in all_] for name, all_ in rounds.items()},
        "processor_s": {
            name: [round(one.processor_s, 3) for one in all_] for name, all_ in rounds.items()
        },
        "load": [min(load), median(load), max(load)],
    }
    records.add(of, result)


def summary(of: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One line about a result: its key, and the means of its figures."""
    said = ("part", "sitting", "guidance", "sampler", "steps", "each", "block")
    name = " ".join(str(of[key]) for key in said if key in of)
    figures = (
        f"{key} {sum(value) / len(value):.4g}"
        for key, value in result.items()
        if isinstance(value, list)
    )
    return f"{name}: {', '.join(figures)}"

"""Measure every cell that has no result yet."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from studies.samplers import convergence, cost, cross_check
from studies.samplers.cells import (
    EVERY,
    EVERY_EVALUATIONS,
    HIGH_SCALES,
    SCALES,
    all_cells,
)
from studies.samplers.measures import relative_errors, slope
from studies.samplers.statistics_files import Missing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from server.models.hosted import HostedModel
    from studies.common.records import Records
    from studies.samplers.cells import Cell
    from studies.samplers.sizes import Sizes
    from studies.samplers.statistics_files import StatisticsFiles
    from studies.samplers.study import Study

PARTS = ("slope", "check", "error", "picture", "spacing", "range", "cost")

CHECKED_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The selection of cells to measure.

    Attributes:
        parts: parts, from :data:`PARTS`.
        contenders: labels of contenders.
        scales: guidance scales.
        evaluations: numbers of evaluations.
    """

    parts: Collection[str] = PARTS
    contenders: Collection[str] = tuple(EVERY)
    scales: Collection[float] = (*SCALES, *HIGH_SCALES)
    evaluations: Collection[int] = EVERY_EVALUATIONS

    def cells(self, sizes: Sizes) -> Iterator[Cell]:
        """The selected cells, the most important first."""
        for cell in all_cells(sizes):
            if (
                cell.part in self.parts
                and cell.contender.label in self.contenders
                and cell.scale in self.scales
                and cell.evaluations in self.evaluations
            ):
                yield cell


Work = tuple[dict[str, Any], "Callable[[], Mapping[str, Any]]"]


def measure(
    study: Study,
    model: HostedModel,
    timed: HostedModel,
    statistics: StatisticsFiles,
    records: Records,
    wanted: Wanted,
    minutes: float,
) -> None:
    """Measure until everything is done or the time is up; prints one line per result.

    Args:
        study: the prompts, references and ranges.
        model: the model under study.
        timed: model that costs are compared with.
        statistics: statistics of the model.
        records: records that results are added to; existing ones are not measured again.
        wanted: selection of what to measure.
        minutes: maximum time; a cell that has started is finished.
    """
    ends = perf_counter() + 60 * minutes
    absent: set[str] = set()
    for of, work in _all_work(study, model, timed, statistics, wanted, absent):
        if of in records:
            continue
        if perf_counter() > ends:
            print("the time is up")
            break
        began = perf_counter()
        try:
            result = work()
        except Missing as missing:
            absent.add(str(missing))
            continue
        except ValueError as refusal:
            result = {"refused": str(refusal)}
        records.add(of, result)
        print(f"{perf_counter() - began:6.1f} s  {_summary(of, result)}", flush=True)
    for sentence in sorted(absent):
        print(f"not measured: {sentence}")


def _all_work(
    study: Study,
    model: HostedModel,
    timed: HostedModel,
    statistics: StatisticsFiles,
    wanted: Wanted,
    absent: set[str],
) -> Iterator[Work]:
    if "slope" in wanted.parts:
        yield from _slopes()
    if "range" in wanted.parts:
        yield _of("range", study, clean=study.sizes.clean_pictures), lambda: _range(study)
    if "check" in wanted.parts:
        yield from _checks(study, model)
    for cell in wanted.cells(study.sizes):
        try:
            name = statistics.name_of(cell.contender.kept, cell.scale)
        except Missing as missing:
            absent.add(str(missing))
            continue
        yield cell.of(study.weights, name), lambda cell=cell: study.run(cell)
    if "cost" in wanted.parts:
        yield from _costs(timed, statistics)


def _of(part: str, study: Study, **entries: Any) -> dict[str, Any]:
    return {"part": part, "weights": study.weights, **entries}


def _slopes() -> Iterator[Work]:
    for sampler in convergence.solvers():

        def work(sampler: Any = sampler) -> dict[str, Any]:
            errors = convergence.errors(sampler, convergence.COUNTS)
            steep = slope(convergence.SLOPE_COUNTS, errors[-len(convergence.SLOPE_COUNTS) :])
            return {"declared": sampler.convergence_order, "slope": steep, "errors": errors}

        settings = sampler.model_dump()
        told = ("name", "order", "corrector", "weights")
        label = " ".join(str(settings[key]) for key in told if settings.get(key))
        yield {"part": "slope", "label": label, "settings": settings}, work


def _range(study: Study) -> dict[str, Any]:
    bounds = study.bounds
    return {"low": bounds.low, "high": bounds.high}


def _checks(study: Study, model: HostedModel) -> Iterator[Work]:
    for scale in (SCALES[0], SCALES[-1]):
        of = _of("reference", study, scale=scale, steps=study.sizes.reference_steps)
        yield of, lambda scale=scale: {"errors": study.check_reference(scale)}
    for order in cross_check.ORDERS:

        def work(order: Any = order) -> dict[str, Any]:
            images = study.sizes.error_images
            plan = cross_check.plan_of_order(order, model.default_schedule)
            ours = study.latents(plan, CHECKED_SCALE, images)
            theirs = cross_check.theirs(order, plan, study.prompts(images), CHECKED_SCALE)
            reference = study.reference("error", CHECKED_SCALE)
            return {
                "apart": relative_errors(ours, theirs),
                "ours": relative_errors(ours, reference),
                "theirs": relative_errors(theirs, reference),
            }

        yield _of("cross", study, order=order, images=study.sizes.error_images), work


def _costs(model: HostedModel, statistics: StatisticsFiles) -> Iterator[Work]:
    machine = {"model": model.facts.name, "device": str(model.device)}
    for rows in cost.ROWS:
        of = {"part": "tick", "rows": rows, **machine}
        yield of, lambda rows=rows: {"ms": cost.tick_ms(model, rows)}
    for contender in EVERY.values():
        of = {"part": "cost", "contender": contender.label, **machine}
        yield of, lambda contender=contender: cost.of(contender, model, statistics)


def _summary(of: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    said = ("part", "label", "contender", "spacing", "evaluations", "scale", "order", "rows")
    name = " ".join(str(of[key]) for key in said if key in of)
    figures = (
        f"{key} {sum(value) / len(value):.4g}" if isinstance(value, list) else f"{key} {value}"
        for key, value in result.items()
    )
    return f"{name}: {', '.join(figures)}"

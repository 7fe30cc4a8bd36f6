"""The cells of the study: the compared samplers, and the cells of each part by importance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from samplers import SAMPLERS, SPACINGS, FittedSampler
from server.requests.schema import DEFAULT_STEPS
from studies.samplers.statistics_files import Kept, Missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from samplers import Grid, NoiseSchedule, Plan, Sampler, Spacing
    from samplers.statistics import Statistics
    from studies.samplers.sizes import Sizes

Part = Literal["error", "picture", "spacing"]

EVALUATIONS = (5, 6, 8, 10, 12, 15, 20)
SCALES = (1.0, 2.0, 4.0, 7.5)
HIGH_SCALES = (4.0, 7.5, 15.0, 30.0)
FEW = (5, 8, 12)
PICTURE_EVALUATIONS = (5, 8, 12, 20)
SPACED_EVALUATIONS = (5, 7, 10)
EVERY_EVALUATIONS = (*EVALUATIONS, *SPACED_EVALUATIONS, *PICTURE_EVALUATIONS, DEFAULT_STEPS)


@dataclass(frozen=True, slots=True)
class Contender:
    """A compared sampler with its settings, under the name used in tables and plots.

    Attributes:
        label: the name.
        settings: settings of the sampler, as in a request.
        kept: which part of the statistics it is given.
        strong: settings from a guidance scale of :data:`STRONG` on, if different.
    """

    label: str
    settings: Mapping[str, Any]
    kept: Kept = ""
    strong: Mapping[str, Any] | None = None

    def settings_at(self, scale: float) -> Mapping[str, Any]:
        """The settings at a guidance scale."""
        return self.strong if self.strong is not None and scale >= STRONG else self.settings

    def sampler(self, scale: float) -> Sampler:
        """The sampler at a guidance scale.

        Raises:
            Missing: none of that name is registered.
        """
        settings = self.settings_at(scale)
        name = settings["name"]
        kind = next((k for k in SAMPLERS if k.model_fields["name"].default == name), None)
        if kind is None:
            raise Missing(f"no sampler {name!r} is registered")
        return kind.model_validate(dict(settings))


def _one(label: str, name: str, kept: Kept = "", **settings: Any) -> Contender:
    return Contender(label, {"name": name, **settings}, kept)


STRONG = 4.0
"""Guidance scale from which a contender's settings for strong guidance are used."""


def _v3(label: str, kept: Kept = "elementwise", **settings: Any) -> Contender:
    """Order 2 with a corrector by divided differences, and without one at strong guidance."""
    common = {"name": "dpm_solver_v3", "order": 2, "predictor": "exact", **settings}
    weak, strong = (
        {**common, "corrector": corrector, "lower_order_final": True}
        for corrector in ("pseudo", "none")
    )
    return Contender(label, weak, kept, strong)


V3 = (
    _v3("v3"),
    _v3("v3, per channel", "per channel"),
    _v3("v3, no statistics", "", statistics="none"),
    _one(
        "v3, order 3",
        "dpm_solver_v3",
        "elementwise",
        order=3,
        predictor="exact",
        corrector="exact",
        lower_order_final=True,
    ),
)

REDUCED = (
    _v3("v3, one number", "one number"),
    _v3("v3, smoothed", "smoothed"),
    _v3("v3, noise prediction", "noise prediction"),
)
"""v3 with reduced statistics, or with statistics that do not depend on the model."""
REDUCED_SCALES = (1.0, 4.0)
REDUCED_EVALUATIONS = (5, 8, 12)

PUBLISHED = _one("v3, published flags", "dpm_solver_v3", "elementwise", preset="published")
"""The published flags, which differ from those of "v3" at guidance 1 and 4; measured there."""

SOLVERS = (
    _one("ddim", "ddim"),
    _one("2M", "dpm_solver_pp"),
    _one("3M", "dpm_solver_pp", order=3),
    _one("unipc", "unipc"),
    _one("unipc 3", "unipc", order=3),
    _one("deis", "deis"),
    _one("ghvb 3.8", "ghvb", order=3.8),
    _one("hb 3.8", "hb", order=3.8),
)

FURTHER = (
    _one("plms", "plms"),
    _one("ghvb 1.8", "ghvb", order=1.8),
    _one("heun", "heun"),
    _one("singlestep 3", "dpm_solver_pp_singlestep", order=3),
)

MOMENTUM = (
    *SOLVERS,
    _one("2M, beta .8", "dpm_solver_pp", beta=0.8),
    _one("2M, beta .5", "dpm_solver_pp", beta=0.5),
    _one("unipc, beta .8", "unipc", beta=0.8),
    _one("unipc, beta .5", "unipc", beta=0.5),
    _one("ghvb 1.8", "ghvb", order=1.8),
    _one("ghvb 2.8", "ghvb", order=2.8),
    _one("ghvb 1.5", "ghvb", order=1.5),
    _one("ghvb 2.5", "ghvb", order=2.5),
    _one("ghvb 3.5", "ghvb", order=3.5),
    _one("AB 2", "ghvb", order=2.0),
    _one("AB 3", "ghvb", order=3.0),
    _one("AB 4", "ghvb", order=4.0),
    _one("plms", "plms"),
    _one("hb 1.8", "hb", order=1.8),
    _one("hb 2.8", "hb", order=2.8),
    _one("nesterov 1.8", "nesterov", order=1.8),
    _one("nesterov 2.8", "nesterov", order=2.8),
    _one("nesterov 3.8", "nesterov", order=3.8),
)

EVERY = {
    contender.label: contender
    for contender in (*V3, PUBLISHED, *REDUCED, *SOLVERS, *FURTHER, *MOMENTUM)
}

MAIN = (*V3, *SOLVERS)
PRACTICE = tuple(EVERY[label] for label in ("v3", "ddim", "2M", "3M", "unipc", "deis", "ghvb 1.8"))
"""Contenders whose accuracy on captions is measured."""
TRADED = tuple(
    EVERY[label]
    for label in (
        *("ddim", "2M", "2M, beta .8", "unipc", "unipc, beta .8", "deis", "AB 2", "AB 4"),
        *("ghvb 1.8", "ghvb 2.8", "ghvb 3.8", "hb 1.8", "hb 3.8"),
    )
)
"""Contenders measured at the highest scales."""
ORDERS = tuple(
    EVERY[label]
    for label in (
        "2M",
        *("ghvb 1.8", "ghvb 3.8", "hb 1.8", "hb 3.8", "nesterov 1.8", "nesterov 3.8"),
    )
)
"""Contenders for choosing a default order, measured with a request's default number of steps."""
ORDER_SCALES = (1.0, 2.0, 4.0)
PRACTICE_SCALE = 4.0
SPACINGS_COMPARED = ("logsnr", "linspace")
SPACED = tuple(
    EVERY[label]
    for label in ("v3", "v3, published flags", "ddim", "2M", "unipc", "deis", "ghvb 1.8")
)
"""Contenders with which spacings are compared at few steps."""
SPACED_SCALES = (1.0, 4.0)
SPACED_OVER = ("time_quadratic", "logsnr", "trailing", "karras")

ERROR_LINES = ("v3", "ddim", "2M", "3M", "unipc", "deis", "ghvb 3.8", "hb 3.8")
"""Lines of the plot of errors."""
VARIANT_LINES = tuple(contender.label for contender in V3)
"""Lines of the plot of v3's variants."""
ACCURACY_LINES = tuple(contender.label for contender in PRACTICE)
"""Lines of the plot of accuracy."""
FAMILIES: Mapping[str, Sequence[tuple[float, str]]] = {
    "no momentum": ((1, "ddim"), (2, "AB 2"), (3, "AB 3"), (4, "AB 4")),
    "ghvb, beta .8": ((2, "ghvb 1.8"), (3, "ghvb 2.8"), (4, "ghvb 3.8")),
    "ghvb, beta .5": ((2, "ghvb 1.5"), (3, "ghvb 2.5"), (4, "ghvb 3.5")),
    "hb, beta .8": ((2, "hb 1.8"), (3, "hb 2.8"), (4, "hb 3.8")),
    "nesterov, beta .8": ((2, "nesterov 1.8"), (3, "nesterov 2.8"), (4, "nesterov 3.8")),
    "2M, 3M": ((2, "2M"), (3, "3M")),
    "2M, beta .8": ((2, "2M, beta .8"),),
    "unipc": ((2, "unipc"), (3, "unipc 3")),
}
"""Lines of the plot of momentum: orders with their contenders."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender at one number of evaluations and one guidance scale.

    Attributes:
        part: ``error`` runs from the noisiest trained level to the cleanest; ``picture`` and
            ``spacing`` run to a clean picture, as a request does.
        contender: the contender.
        spacing: name of the spacing; empty for the sampler's default.
        evaluations: number of evaluations of the guided model.
        scale: scale of classifier-free guidance; 1 is no guidance.
        images: number of images, whose seeds and prompts start at 0.
    """

    part: Part
    contender: Contender
    spacing: str
    evaluations: int
    scale: float
    images: int

    def of(self, weights: str, statistics: str) -> dict[str, Any]:
        """Key of its result in the records.

        Args:
            weights: identifier of the model.
            statistics: identifier of the statistics.
        """
        return {
            "part": self.part,
            "contender": self.contender.label,
            "settings": dict(self.contender.settings_at(self.scale)),
            "kept": self.contender.kept,
            "statistics": statistics,
            "spacing": self.spacing,
            "evaluations": self.evaluations,
            "scale": self.scale,
            "images": self.images,
            "weights": weights,
        }


def plan_of(cell: Cell, schedule: NoiseSchedule, statistics: Statistics | None) -> Plan:
    """The plan that uses exactly the cell's evaluations.

    Raises:
        Missing: no sampler of the name is registered.
        ValueError: the sampler refuses so few steps, or has no run with this number of evaluations.
    """
    sampler = cell.contender.sampler(cell.scale)
    spacing = _spacing_named(cell.spacing or sampler.default_spacing)
    t_end = schedule.t_end if cell.part == "error" else None
    for steps in range(cell.evaluations, 0, -1):
        grid = schedule.grid(spacing, steps, t_end=t_end)
        plan = planned(sampler, grid, statistics)
        if plan.evaluations == cell.evaluations:
            return plan
        if plan.evaluations < cell.evaluations:
            break
    raise ValueError(f"{cell.contender.label} has no run of {cell.evaluations} evaluations.")


def planned(sampler: Sampler, grid: Grid, statistics: Statistics | None) -> Plan:
    """The plan over a grid, with statistics for a sampler that uses them."""
    if isinstance(sampler, FittedSampler):
        return sampler.plan(grid, statistics)
    return sampler.plan(grid)


def _spacing_named(name: str) -> Spacing:
    return next(k for k in SPACINGS if k.model_fields["name"].default == name).model_validate({})


def all_cells(sizes: Sizes) -> Iterator[Cell]:
    """Every cell, the most important first."""
    yield from _error_cells(MAIN, (7.5, 1.0, 4.0), sizes)
    yield from _error_cells((PUBLISHED,), (1.0, 4.0), sizes)
    for scale, contender, evaluations in product(REDUCED_SCALES, REDUCED, REDUCED_EVALUATIONS):
        yield Cell("error", contender, "logsnr", evaluations, scale, sizes.error_images)
    yield from _high_scale_cells(7.5, MOMENTUM, FEW, sizes)
    yield from _accuracy_cells(sizes)
    yield from _spacing_cells(sizes)
    yield from _error_cells(MAIN, (2.0,), sizes)
    yield from _high_scale_cells(15.0, TRADED, FEW, sizes)
    for scale in (30.0, 4.0):
        yield from _high_scale_cells(scale, TRADED, FEW[1:2], sizes)
    yield from _error_cells(FURTHER, (7.5, 1.0, 4.0, 2.0), sizes)
    for scale, contender in product(ORDER_SCALES, ORDERS):
        yield Cell("picture", contender, "", DEFAULT_STEPS, scale, sizes.picture_images)


def _error_cells(
    contenders: Sequence[Contender], scales: Sequence[float], sizes: Sizes
) -> Iterator[Cell]:
    for scale, spacing in product(scales, SPACINGS_COMPARED):
        for contender, evaluations in product(contenders, EVALUATIONS):
            yield Cell("error", contender, spacing, evaluations, scale, sizes.error_images)


def _spacing_cells(sizes: Sizes) -> Iterator[Cell]:
    for scale, evaluations in product(SPACED_SCALES, SPACED_EVALUATIONS):
        for contender, spacing in product(SPACED, SPACED_OVER):
            yield Cell("spacing", contender, spacing, evaluations, scale, sizes.spaced_images)


def _accuracy_cells(sizes: Sizes) -> Iterator[Cell]:
    for evaluations, contender in product(PICTURE_EVALUATIONS, PRACTICE):
        yield Cell("picture", contender, "", evaluations, PRACTICE_SCALE, sizes.accuracy_images)


def _high_scale_cells(
    scale: float, contenders: Sequence[Contender], counts: Sequence[int], sizes: Sizes
) -> Iterator[Cell]:
    practised = {contender.label for contender in PRACTICE} if scale == PRACTICE_SCALE else set()
    for contender, evaluations in product(contenders, counts):
        if contender.label not in practised:
            yield Cell("picture", contender, "", evaluations, scale, sizes.picture_images)

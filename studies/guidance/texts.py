"""Figures as text, and the table of accuracy and appearance of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from studies.common.intervals import mean_and_error, wilson
from studies.common.page import NO_VALUE, table
from studies.guidance.cells import STEPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from studies.guidance.results import Figures, Results

LOOKS = ["right", "saturation", "contrast", "clipped, %", "farther than the truth", "diversity"]


def looks(
    results: Results,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    steps: int = STEPS,
    sampler: Mapping[str, Any] | None = None,
    truth: bool = False,
    moved: bool = False,
) -> str:
    """Accuracy, appearance and cost of images: one row per guidance.

    Args:
        results: all results; guidance without a result is left out.
        rows: guidance by name.
        steps: number of steps of the sampler.
        sampler: the sampler; None for the default one.
        truth: whether to add a row for the true pictures.
        moved: whether to add a column for how far latents moved.
    """
    lines: list[list[str]] = []
    for name, guidance in rows.items():
        figures = results.found(guidance, "captions", steps, sampler)
        if figures is not None:
            again = results.found(guidance, "again", steps, sampler)
            cost = f"{figures.mean('evaluations'):.1f}"
            far = [_moved(figures)] if moved else []
            lines.append([name, *_look(results, figures, again), *far, cost])
    if truth and results.truth is not None:
        lines.append(["*true pictures*", *_look(results, results.truth, None), NO_VALUE])
    return table(["guidance", *LOOKS, *["moved by"] * moved, "evaluations"], lines)


def _look(results: Results, figures: Figures, again: Figures | None) -> list[str]:
    far = figures.beyond
    return [
        share(figures),
        of_truth(results, figures, "saturation"),
        of_truth(results, figures, "contrast"),
        f"{100 * figures.mean('clipped'):.1f}",
        NO_VALUE if far is None else f"{far[0]:.2f} ± {far[1]:.2f}",
        NO_VALUE if again is None else mean(again, "apart", 2),
    ]


def _moved(figures: Figures) -> str:
    return mean(figures, "moved", 3) if figures.values("moved") else NO_VALUE


def share(figures: Figures) -> str:
    """Number of right pictures, with the interval of their proportion."""
    return part(*figures.right)


def part(right: int, of: int) -> str:
    """A count of a total, with the interval of the proportion."""
    low, high = wilson(right, of)
    return f"{right} of {of}, {right / of:.0%} ({low:.0%} to {high:.0%})"


def of_truth(results: Results, figures: Figures, name: str) -> str:
    """Ratio of a figure to that of the true pictures, with its interval."""
    if results.truth is None:
        return f"{figures.mean(name):.3f}"
    middle, low, high = figures.relative(results.truth, name)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def mean(figures: Figures, name: str, digits: int) -> str:
    """A figure's mean over images, and its standard error."""
    return plus_minus(figures.values(name), digits)


def plus_minus(values: Sequence[float], digits: int) -> str:
    """The mean and its standard error."""
    middle, error = mean_and_error(values)
    return f"{middle:.{digits}f} ± {error:.{digits}f}"


def changed(figures: Figures, other: Figures) -> str:
    """Pictures gained and lost against another guidance."""
    gained, lost, of = figures.changed(other)
    return f"+{gained} −{lost} of {of}"

"""Tables for terms that act inside the network, through the classifier, or between images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from studies.common.page import NO_VALUE, table
from studies.guidance import cells
from studies.guidance.texts import (
    changed,
    looks,
    mean,
    of_truth,
    part,
    plus_minus,
    share,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from studies.guidance.results import Figures, Results


def perturbed(results: Results) -> str:
    """Perturbations and skip-tuning, with and without guidance."""
    rows: dict[str, Mapping[str, Any]] = {}
    for base_name, base in (("none", cells.UNGUIDED), ("cfg 4", cells.BASE)):
        rows[base_name] = base
        for name, settings in cells.PERTURBATIONS.items():
            rows[f"{base_name}, {name}"] = {**base, "perturbed": [settings]}
        for bottom in cells.BOTTOMS:
            rows[f"{base_name}, skip_tuning {bottom:g}"] = cells.tuned(base, bottom)
    return looks(results, rows, moved=True)


def layers(results: Results) -> str:
    """The same perturbations applied to one level of the network at a time."""
    plain = results.found(cells.UNGUIDED)
    lines: list[list[str]] = []
    for name, settings in cells.ELSEWHERE.items():
        figures = results.found({**cells.UNGUIDED, "perturbed": [settings]})
        if figures is not None and plain is not None:
            lines.append(
                [
                    name,
                    mean(figures, "moved", 3),
                    share(figures),
                    changed(figures, plain),
                    of_truth(results, figures, "saturation"),
                    f"{100 * figures.mean('clipped'):.1f}",
                ]
            )
    head = ["perturbation", "moved by", "right", "against none", "saturation", "clipped, %"]
    return table(head, lines)


def background(results: Results) -> str:
    """Classifier guidance towards a background that the prompt does not mention."""
    return _aimed(results, cells.BACKGROUND, ["background"], beside=True)


def confused(results: Results) -> str:
    """Classifier guidance towards the shape and color that the prompt mentions."""
    return _aimed(results, cells.CONFUSED, ["shape", "colour"])


def _aimed(
    results: Results,
    rows: Mapping[str, Mapping[str, Any]],
    aims: list[str],
    *,
    beside: bool = False,
) -> str:
    """How often the classifier's targets were met and, if ``beside``, the prompt's other claims."""
    lines: list[list[str]] = []
    for name, guidance in rows.items():
        figures = results.found(guidance, "aimed")
        if figures is not None:
            met = [part(*figures.attribute(aim)) for aim in aims]
            said, of = figures.attribute("count", "shape", "colour", "size")
            clipped, cost = figures.mean("clipped"), figures.mean("evaluations")
            rest = [f"{said / of:.1%}"] * beside
            lines.append([name, *met, *rest, f"{100 * clipped:.1f}", f"{cost:.1f}"])
    head = ["guidance", *aims, *["what the prompt says"] * beside, "clipped, %", "evaluations"]
    return table(head, lines)


def apart(results: Results) -> str:
    """Images of a request that are pushed away from the first."""
    return _groups(results, cells.APART, "cfg 4", None)


def particles(results: Results) -> str:
    """Images of a request as particles, compared with independent images."""
    halves = [
        {name: one for name, one in cells.PARTICLES.items() if name.startswith(base)}
        for base in ("cfg 2", "cfg 4")
    ]
    tables = [_groups(results, half, next(iter(half)), cells.ANCESTRAL) for half in halves]
    return "\n".join([tables[0], *tables[1].splitlines()[2:]])


def _groups(
    results: Results,
    rows: Mapping[str, Mapping[str, Any]],
    base: str,
    sampler: Mapping[str, Any] | None,
) -> str:
    """Accuracy and distances within requests of several images, and differences from the base."""
    found = {
        name: results.found(one, "captions", cells.STEPS, sampler, cells.GROUP)
        for name, one in rows.items()
    }
    plain = found[base]
    lines: list[list[str]] = []
    for name, figures in found.items():
        if figures is not None and plain is not None:
            beside = name != base
            lines.append(
                [
                    name,
                    plus_minus(figures.shares, 3),
                    _more(figures.shares, plain.shares) if beside else NO_VALUE,
                    mean(figures, "apart", 3),
                    _more_of(figures, plain, "apart") if beside else NO_VALUE,
                    f"{100 * figures.mean('clipped'):.1f}",
                    f"{figures.mean('evaluations'):.1f}",
                ]
            )
    head = ["guidance", "right", "more", "apart", "more", "clipped, %", "evaluations"]
    return table(head, lines)


def _more_of(figures: Figures, other: Figures, name: str) -> str:
    return _more(figures.values(name), other.values(name))


def _more(ours: list[float], theirs: list[float]) -> str:
    middle = np.subtract(ours, theirs)
    return f"{'+' if middle.mean() >= 0 else '−'}{plus_minus(middle.tolist(), 3).lstrip('-')}"

"""The page's tables, in Markdown."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.common.page import NO_VALUE, table
from studies.guidance import cells
from studies.guidance.texts import changed, looks, mean, part, share

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from studies.guidance.cells import Sitting
    from studies.guidance.results import Figures, Results

NOT_YET = "Not measured yet."


def scales(results: Results) -> str:
    """CFG, APG and guidance in an interval at their scales, and the true pictures."""
    rows: dict[str, Mapping[str, Any]] = {}
    for scale in cells.SCALES:
        rows["none" if scale == 1 else f"cfg {scale:g}"] = cells.cfg(scale)
    rows |= {f"apg {scale:g}": cells.apg(scale) for scale in cells.HIGH_SCALES}
    rows |= {
        f"cfg {scale:g}, interval": cells.by(cells.cfg(scale), "interval")
        for scale in cells.HIGH_SCALES
    }
    return looks(results, rows, truth=True)


def plus(results: Results) -> str:
    """CFG++ compared with CFG."""
    rows = {f"cfg_plus_plus {scale:g}": cells.plus(scale) for scale in cells.PLUS_SCALES}
    rows |= {f"cfg {scale:g}": cells.cfg(scale) for scale in cells.SCALES if scale > 1}
    return looks(results, rows)


def apg_variants(results: Results) -> str:
    """APG at scale 7.5 with parts removed."""
    named = {f"apg 7.5, {name}": guidance for name, guidance in cells.APG_VARIANTS.items()}
    return looks(results, {"cfg 7.5": cells.cfg(7.5), "apg 7.5": cells.apg(7.5), **named})


def solved(results: Results) -> str:
    """High scales with other samplers and more steps."""
    lines: list[list[str]] = []
    for name, guidance in cells.SOLVED.items():
        found = [
            results.found(guidance, "captions", steps, sampler)
            for sampler, steps in cells.SOLVED_BY.values()
        ]
        lines.append([name, *(_right_and_clipped(figures) for figures in found)])
    return table(["guidance", *cells.SOLVED_BY], lines)


def _right_and_clipped(figures: Figures | None) -> str:
    if figures is None:
        return NO_VALUE
    return f"{share(figures)}, {100 * figures.mean('clipped'):.1f} % clipped"


def plus_at_50(results: Results) -> str:
    """CFG++ compared with CFG, with DDIM and 50 steps."""
    return looks(results, cells.PLUS_AT_50, steps=cells.MORE_STEPS, sampler=cells.DDIM)


def rules(results: Results, scale: float) -> str:
    """The other rules at one scale."""
    rows = {f"cfg {scale:g}": cells.cfg(scale), f"apg {scale:g}": cells.apg(scale)}
    others = {name: {**rule, "scale": scale} for name, rule in cells.OTHER_RULES.items()}
    if not any(map(results.found, others.values())):
        return NOT_YET
    return looks(results, {**rows, **others})


def frequencies(results: Results) -> str:
    """Frequency-decoupled guidance compared with CFG."""
    rows = {
        f"frequency_decoupled {one['scale']:g}, detail {one['scale_high']:g}": one
        for one in cells.FREQUENCIES
    }
    if not any(map(results.found, rows.values())):
        return NOT_YET
    return looks(results, {"cfg 4": cells.BASE, "cfg 7.5": cells.cfg(7.5), **rows})


def combined(results: Results) -> str:
    """Rules with policies, compared with the rules alone."""
    rows = {
        "cfg 2": cells.cfg(2.0),
        "cfg 4": cells.BASE,
        "apg 4": cells.apg(4.0),
        "magnitude_aware 7.5": cells.magnitude_aware(7.5),
        "cfg_plus_plus 0.6": cells.plus(0.6),
    }
    return looks(results, {**rows, **cells.COMBINED})


def savings(results: Results) -> str:
    """Savings of policies with CFG 4, and the similarity of their images to those of full CFG."""
    rows: dict[str, Mapping[str, Any]] = {
        f"adaptive {threshold:g}": guidance for threshold, guidance in cells.ADAPTIVE.items()
    }
    rows["adaptive .991, of the noise"] = cells.ADAPTIVE_NOISE
    rows |= cells.LINEAR
    rows |= {f"reuse {every}": guidance for every, guidance in cells.REUSED.items()}
    rows |= cells.INTERVALS
    return _savings(results, {"always": cells.BASE, **rows, "none": cells.UNGUIDED}, cells.BASE)


def combined_savings(results: Results) -> str:
    """The same with other rules, each compared with its own full guidance."""
    head = ["guidance", "evaluations", "saved", "PSNR, dB", "worst tenth", "right", "against full"]
    lines: list[list[str]] = []
    for name, guidance in cells.COMBINED.items():
        full = {key: value for key, value in guidance.items() if key != "policy"}
        line = _saving(results, name, guidance, results.found(full))
        lines += [] if line is None else [line]
    return table(head, lines)


def _savings(
    results: Results, rows: Mapping[str, Mapping[str, Any]], full: Mapping[str, Any]
) -> str:
    head = ["policy", "evaluations", "saved", "PSNR, dB", "worst tenth", "right", "against full"]
    found = (_saving(results, name, one, results.found(full)) for name, one in rows.items())
    return table(head, [line for line in found if line is not None])


def _saving(
    results: Results, name: str, guidance: Mapping[str, Any], full: Figures | None
) -> list[str] | None:
    figures = results.found(guidance)
    if figures is None or full is None:
        return None
    decibels = figures.values("psnr")
    # Without guidance no policy saves evaluations; the rule itself takes half of them.
    saved = 1 - figures.mean("evaluations") / full.mean("evaluations")
    return [
        name,
        f"{figures.mean('evaluations'):.1f}",
        f"{saved:.0%}",
        mean(figures, "psnr", 1) if decibels else NO_VALUE,
        f"{np.quantile(decibels, 0.1):.1f}" if decibels else NO_VALUE,
        share(figures),
        changed(figures, full),
    ]


def few_steps(results: Results) -> str:
    """Residual guidance with few steps."""
    rows: dict[str, Mapping[str, Any]] = {
        "none": cells.UNGUIDED,
        "cfg 2": cells.cfg(2.0),
        "cfg 4": cells.BASE,
        **{
            f"residual onetime, cfg {scale:g}": cells.by(
                cells.cfg(scale), "residual", mode="onetime"
            )
            for scale in cells.RESIDUAL_SCALES
        },
        "cfg 4, skip_tuning 0.8": cells.tuned(cells.BASE, 0.8),
        "cfg 4, skip_tuning 0.6": cells.tuned(cells.BASE, 0.6),
    }
    return _right_by(results, rows, cells.FEW_STEPS, "captions")


def from_pictures(results: Results) -> str:
    """Residual guidance with the picture that a run starts from."""
    rows: dict[str, Mapping[str, Any]] = {"none": cells.UNGUIDED, "cfg 4": cells.BASE}
    for scale in cells.RESIDUAL_SCALES:
        rows[f"residual self, cfg {scale:g}"] = cells.by(cells.cfg(scale), "residual")
    return _right_by(results, rows, (5,), "pictures")


def _right_by(
    results: Results,
    rows: Mapping[str, Mapping[str, Any]],
    steps: Sequence[int],
    sitting: Sitting,
) -> str:
    lines: list[list[str]] = []
    for name, guidance in rows.items():
        found = [results.found(guidance, sitting, n) for n in steps]
        if any(figures is not None for figures in found):
            lines.append([name, *(_right_and_cost(figures) for figures in found)])
    return table(["guidance", *(f"{n} steps" for n in steps)], lines)


def _right_and_cost(figures: Figures | None) -> str:
    if figures is None:
        return NO_VALUE
    return f"{share(figures)}, {figures.mean('evaluations'):.1f} evaluations"


def overlapping(results: Results) -> str:
    """Negative prompts that overlap with the caption."""
    return _of_sitting(results, "overlapping", cells.OVERLAPPING, _right_column)


def avoiding(results: Results) -> str:
    """Whether the white background of the negative prompt is avoided."""

    def columns(figures: Figures) -> dict[str, str]:
        white, of = int(sum(figures.values("white"))), len(figures.values("white"))
        return {"white all the same": part(white, of), **_right_column(figures)}

    return _of_sitting(results, "avoiding", cells.AVOIDING, columns)


def composed(results: Results) -> str:
    """Captions of two things, with each thing as a prompt of its own."""
    return _of_sitting(results, "two", cells.COMPOSED, _right_column)


def _right_column(figures: Figures) -> dict[str, str]:
    return {"right": share(figures), "evaluations": f"{figures.mean('evaluations'):.1f}"}


def _of_sitting(
    results: Results,
    sitting: Sitting,
    rows: Mapping[str, Mapping[str, Any]],
    columns: Callable[[Figures], dict[str, str]],
) -> str:
    found = {name: results.found(guidance, sitting) for name, guidance in rows.items()}
    lines = {name: columns(figures) for name, figures in found.items() if figures is not None}
    if not lines:
        return NOT_YET
    head = next(iter(lines.values()))
    return table(["guidance", *head], [[name, *line.values()] for name, line in lines.items()])


def rates(results: Results) -> str:
    """Images per second of the engine with each guidance."""
    record = results.rates
    if record is None:
        return NO_VALUE
    images, always = record["of"]["images"], median(record["wall_s"]["always"])
    worked = median(record["processor_s"]["always"])
    lines: list[list[str]] = []
    for name, walls in record["wall_s"].items():
        figures = results.found(cells.RATED[name])
        middle, processor = median(walls), median(record["processor_s"][name])
        lines.append(
            [
                name,
                f"{images / middle:.2f} ({images / max(walls):.2f} to {images / min(walls):.2f})",
                f"{always / middle:.2f} x",
                f"{worked / processor:.2f} x",
                NO_VALUE if figures is None else f"{figures.mean('evaluations'):.1f}",
                NO_VALUE if figures is None else share(figures),
            ]
        )
    head = ["policy", "images/s", "of always", "by processor time", "evaluations", "right"]
    return table(head, lines)


def quiet(results: Results) -> str:
    """Load of the machine during the timings."""
    record = results.rates
    if record is None:
        return "not measured"
    low, middle, high = record["load"]
    of = record["of"]
    return (
        f"{of['rounds']} rounds of {of['images']} images, {of['rows']} rows a forward, one thread;"
        f" load average {low:.1f} to {high:.1f}, median {middle:.1f}"
    )

"""The page's tables, in Markdown."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from server.requests.schema import DEFAULT_STEPS
from studies.common.intervals import mean_and_error, ratio, wilson
from studies.common.page import NO_VALUE, table
from studies.samplers.cells import (
    EVALUATIONS,
    EVERY,
    FEW,
    FURTHER,
    ORDER_SCALES,
    ORDERS,
    PICTURE_EVALUATIONS,
    PRACTICE,
    PRACTICE_SCALE,
    PUBLISHED,
    REDUCED,
    REDUCED_EVALUATIONS,
    REDUCED_SCALES,
    SCALES,
    SOLVERS,
    SPACED,
    SPACED_EVALUATIONS,
    SPACED_OVER,
    SPACED_SCALES,
    SPACINGS_COMPARED,
    V3,
)
from studies.samplers.cost import ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studies.samplers.results import Found, Results

MARKS = {"logsnr": "", "linspace": "<sup>t</sup>"}
NEVER = float("inf")
V3_LABELS = [contender.label for contender in (*V3, PUBLISHED, *REDUCED)]
COMPARED = [label for label in EVERY if label not in {one.label for one in REDUCED}]
OTHERS = [label for label in EVERY if label not in V3_LABELS]


TIMED = [contender.label for contender in (*V3, *SOLVERS, *FURTHER)]


def which(results: Results) -> str:
    """The best sampler at each number of evaluations, by error and by accuracy."""
    labels = [label for label in EVERY if label in (*OTHERS, V3_LABELS[0])]
    head = ["evaluations", *(f"guidance {scale:g}" for scale in SCALES)]
    return table(
        head,
        (
            [str(n), *(_leaders(results.ranked(labels, n, scale)) for scale in SCALES)]
            for n in EVALUATIONS
        ),
    )


def _leaders(ranked: list[Found]) -> str:
    if not ranked:
        return NO_VALUE
    first = ranked[0]
    text = f"**{first.contender}**{MARKS[first.spacing]} {_figure(first.mean)}"
    rest = next((f for f in ranked[1:] if f.contender != first.contender), None)
    if rest is None:
        return text
    return f"{text}; {rest.contender}{MARKS[rest.spacing]} {_figure(rest.mean)}"


def errors(results: Results, scale: float) -> str:
    """Mean error and its standard error, each sampler with its better spacing."""
    head = ["sampler", *(str(n) for n in EVALUATIONS)]
    best = {n: results.ranked(COMPARED, n, scale) for n in EVALUATIONS}
    rows: list[list[str]] = []
    for label in COMPARED:
        found = [results.better(label, n, scale) for n in EVALUATIONS]
        if all(f is None for f in found):
            continue
        texts = [
            NO_VALUE if f is None else _with_error(f, leads=f == best[n][0])
            for n, f in zip(EVALUATIONS, found, strict=True)
        ]
        rows.append([label, *texts])
    return table(head, rows)


def _with_error(found: Found, *, leads: bool) -> str:
    mean, error = mean_and_error(found.errors)
    text = f"{_figure(mean)} ± {_figure(error)}"
    return f"**{text}**{MARKS[found.spacing]}" if leads else f"{text}{MARKS[found.spacing]}"


def regret(results: Results, few: Sequence[int] = (5, 6, 8, 10)) -> str:
    """Error of each sampler relative to the best one, at few evaluations and at worst."""
    rows: list[tuple[float, list[str]]] = []
    for label in COMPARED:
        behind = [[_behind(results, label, n, scale) for n in few] for scale in SCALES]
        known = [ratio for ratios in behind for ratio in ratios if ratio is not None]
        if len(known) < len(SCALES) * len(few):
            continue
        texts = [f"{_geometric(list(filter(None, ratios))):.2f}" for ratios in behind]
        overall = _geometric(known)
        rows.append((overall, [label, *texts, f"{overall:.2f}", f"{max(known):.1f}"]))
    head = ["sampler", *(f"guidance {scale:g}" for scale in SCALES), "all", "at worst"]
    return table(head, (texts for _, texts in sorted(rows, key=lambda row: row[0])))


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _behind(results: Results, label: str, evaluations: int, scale: float) -> float | None:
    found = results.better(label, evaluations, scale)
    if found is None:
        return None
    return found.mean / results.ranked(COMPARED, evaluations, scale)[0].mean


def against_the_best(results: Results) -> str:
    """The error of v3 divided by that of the best other sampler, image by image."""
    head = ["evaluations", *(f"guidance {scale:g}" for scale in SCALES)]
    return table(
        head,
        ([str(n), *(_against(results, n, scale) for scale in SCALES)] for n in EVALUATIONS),
    )


def _against(results: Results, evaluations: int, scale: float) -> str:
    ours = results.better(V3_LABELS[0], evaluations, scale)
    others = results.ranked(OTHERS, evaluations, scale)
    if ours is None or not others:
        return NO_VALUE
    middle, low, high = ratio(ours.errors, others[0].errors)
    return f"{middle:.2f} ({low:.2f} to {high:.2f}) of {others[0].contender}"


def variants(results: Results, few: Sequence[int] = (5, 6, 8, 10)) -> str:
    """Errors of v3's variants divided by those of v3, over all images at few evaluations."""
    head = ["variant", "spacing", *(f"guidance {scale:g}" for scale in SCALES)]
    rows: list[list[str]] = []
    for label in V3_LABELS[: -len(REDUCED)]:
        for spacing in SPACINGS_COMPARED:
            texts = [_variant(results, label, spacing, scale, few) for scale in SCALES]
            if any(text != NO_VALUE for text in texts):
                rows.append([label, spacing, *texts])
    return table(head, rows)


def _variant(results: Results, label: str, spacing: str, scale: float, few: Sequence[int]) -> str:
    ours: list[float] = []
    theirs: list[float] = []
    for n in few:
        found = results.errors(label, spacing, n, scale)
        base = results.errors(V3_LABELS[0], "logsnr", n, scale)
        if found is None or base is None:
            return NO_VALUE
        ours += found.errors
        theirs += base.errors
    middle, low, high = ratio(ours, theirs)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def reduced(results: Results) -> str:
    """Errors of v3 with reduced statistics, with the spacing ``logsnr``."""
    labels = ("v3", "v3, per channel", *(contender.label for contender in REDUCED))
    head = [
        "statistics",
        *(f"guidance {s:g} at {n}" for s in REDUCED_SCALES for n in REDUCED_EVALUATIONS),
    ]
    rows: list[list[str]] = []
    for label in labels:
        found = [
            results.errors(label, "logsnr", n, s)
            for s in REDUCED_SCALES
            for n in REDUCED_EVALUATIONS
        ]
        rows.append([label, *(NO_VALUE if f is None else _figure(f.mean) for f in found)])
    return table(head, rows)


def momentum(results: Results, scale: float) -> str:
    """Elements outside the range, error and accuracy, at few steps and a high scale."""
    head = [
        "sampler",
        *(f"beyond at {n}" for n in FEW),
        *(f"error at {n}" for n in FEW),
        *(f"right at {n}" for n in FEW),
    ]
    rows: list[list[str]] = []
    for label in results.measured("picture"):
        found = [results.picture(label, n, scale) for n in FEW]
        if all(record is None for record in found):
            continue
        rows.append(
            [
                label,
                *(_share_of(record, "beyond") for record in found),
                *(NO_VALUE if r is None else _figure(float(np.mean(r["errors"]))) for r in found),
                *(_count_of(record) for record in found),
            ]
        )
    return table(head, rows)


def _share_of(record: dict[str, Any] | None, name: str) -> str:
    if record is None:
        return NO_VALUE
    mean, error = mean_and_error(record[name])
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def _count_of(record: dict[str, Any] | None) -> str:
    return NO_VALUE if record is None else f"{sum(record['right'])} of {len(record['right'])}"


def spacings(results: Results, scale: float) -> str:
    """Error and accuracy of each sampler with each spacing, with the lowest error in bold."""
    rows: list[list[str]] = []
    for contender, n in product(SPACED, SPACED_EVALUATIONS):
        found = [results.spaced(contender.label, spacing, n, scale) for spacing in SPACED_OVER]
        means = [NEVER if r is None else float(np.mean(r["errors"])) for r in found]
        rows.append(
            [
                contender.label,
                str(n),
                *(
                    NO_VALUE if r is None else _spaced(mean, r, leads=mean == min(means))
                    for r, mean in zip(found, means, strict=True)
                ),
            ]
        )
    return table(["sampler", "evaluations", *SPACED_OVER], rows)


def _spaced(mean: float, record: dict[str, Any], *, leads: bool) -> str:
    figure = f"**{_figure(mean)}**" if leads else _figure(mean)
    return f"{figure}, {_count_of(record)}"


def spacing_ratios(results: Results) -> str:
    """Errors with the first spacing divided by those with the others, image by image."""
    first, *others = SPACED_OVER
    head = ["sampler", *(f"{one}, guidance {scale:g}" for scale in SPACED_SCALES for one in others)]
    rows = (
        [
            contender.label,
            *(
                _spaced_ratio(results, contender.label, first, other, scale)
                for scale in SPACED_SCALES
                for other in others
            ),
        ]
        for contender in SPACED
    )
    return table(head, rows)


def _spaced_ratio(results: Results, label: str, first: str, other: str, scale: float) -> str:
    ours: list[float] = []
    theirs: list[float] = []
    for n in SPACED_EVALUATIONS:
        found, base = (results.spaced(label, spacing, n, scale) for spacing in (first, other))
        if found is None or base is None:
            return NO_VALUE
        ours += found["errors"]
        theirs += base["errors"]
    middle, low, high = ratio(ours, theirs)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def orders(results: Results) -> str:
    """Error and accuracy of candidates for the default order, with the default number of steps."""
    head = [
        "sampler",
        *(f"error at guidance {scale:g}" for scale in ORDER_SCALES),
        *(f"right at {scale:g}" for scale in ORDER_SCALES),
    ]
    rows: list[list[str]] = []
    for contender in ORDERS:
        found = [results.picture(contender.label, DEFAULT_STEPS, scale) for scale in ORDER_SCALES]
        errors = (NO_VALUE if r is None else _figure(float(np.mean(r["errors"]))) for r in found)
        rows.append([contender.label, *errors, *(_count_of(record) for record in found)])
    return table(head, rows)


def accuracy(results: Results) -> str:
    """Proportion of right pictures at the usual scale, with its 95 % interval."""
    rows = (
        [
            contender.label,
            *(
                _accuracy(results.picture(contender.label, n, PRACTICE_SCALE))
                for n in PICTURE_EVALUATIONS
            ),
        ]
        for contender in PRACTICE
    )
    return table(["sampler", *(str(n) for n in PICTURE_EVALUATIONS)], rows)


def _accuracy(record: dict[str, Any] | None) -> str:
    if record is None:
        return NO_VALUE
    right, of = sum(record["right"]), len(record["right"])
    low, high = wilson(right, of)
    return f"{right / of:.0%} ({low:.0%} to {high:.0%})"


def slopes(results: Results) -> str:
    """The measured slope of each solver compared with the declared one."""
    rows = (
        [
            record["of"]["label"],
            f"{record['declared']}",
            f"{record['slope']:.2f}",
            *(f"{e:.2g}" for e in record["errors"][1:4]),
        ]
        for record in results.of_part("slope")
    )
    return table(["sampler", "declared", "slope", "error at 10", "20", "40"], rows)


def _figure(value: float) -> str:
    """A figure with two or three significant digits."""
    if not np.isfinite(value) or value >= 1000:
        return "∞" if not np.isfinite(value) else f"{value:.0f}"
    return f"{value:#.2g}" if value < 0.1 else f"{value:.3g}"


def cost(results: Results) -> str:
    """Milliseconds of plan and advance, and advance as a fraction of the model's forward pass."""
    ticks = {
        (r["of"]["model"], r["of"]["device"], r["of"]["rows"]): r["ms"]
        for r in results.of_part("tick")
    }
    rows: list[list[str]] = []
    for record in results.of_part("cost"):
        of = record["of"]
        if of["contender"] not in TIMED:
            continue
        shares = [
            f"{record[f'advance_{n}']:.3f} ms, "
            f"{record[f'advance_{n}'] / ticks[of['model'], of['device'], n]:.2%}"
            for n in ROWS
        ]
        rows.append(
            [
                f"{of['contender']} ({of['model']}, {of['device']})",
                f"{record['plan']:.1f}",
                f"{record['plan_large']:.1f}",
                *shares,
            ]
        )
    return table(
        ["sampler", "plan, ms", "plan at [4, 64, 64], ms", *(f"advance, {n} rows" for n in ROWS)],
        rows,
    )


def ticks(results: Results) -> str:
    """A list of the forward passes that costs are compared with."""
    return "; ".join(
        f"{r['of']['model']} on {r['of']['device']}, {r['of']['rows']} rows: {r['ms']:.0f} ms"
        for r in results.of_part("tick")
    )


def reference(results: Results) -> str:
    """Distance of another solver with as many steps from the reference."""
    rows = (
        [f"{r['of']['scale']:g}", *(f"{figure(r['errors'])[n]:.1e}" for n in (0, 1))]
        for r in results.of_part("reference")
    )
    return table(["guidance", "mean distance", "largest"], rows)


def cross_check(results: Results) -> str:
    """One cell computed by Weft and by diffusers' own pipeline and scheduler."""
    rows = (
        [
            f"DPM-Solver++ {r['of']['order']}M",
            f"{figure(r['apart'])[1]:.1e}",
            f"{figure(r['ours'])[0]:.5f}",
            f"{figure(r['theirs'])[0]:.5f}",
        ]
        for r in results.of_part("cross")
    )
    return table(
        ["sampler", "largest distance between both", "error, ours", "error, diffusers'"], rows
    )


def statistics(results: Results) -> str:
    """Sizes of the statistics used by v3, by guidance scale."""
    found: dict[float, str] = {}
    for record in results.of_part("error"):
        if name := record["of"]["statistics"]:
            points, samples = name.split("-")[0].split("x")
            found[record["of"]["scale"]] = f"{samples} samples at {points} points"
    return "; ".join(f"guidance {scale:g}, {said}" for scale, said in sorted(found.items()))


def images(results: Results, part: str) -> str:
    """The largest number of images of a cell."""
    return str(max((r["of"]["images"] for r in results.of_part(part)), default=0))


def figure(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the maximum."""
    return float(np.mean(values)), float(np.max(values))

"""The plots of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from studies.common.intervals import mean_and_error, wilson
from studies.common.looks import COLORS, MARKERS
from studies.samplers.cells import (
    ACCURACY_LINES,
    ERROR_LINES,
    EVALUATIONS,
    FAMILIES,
    FEW,
    HIGH_SCALES,
    PICTURE_EVALUATIONS,
    PRACTICE_SCALE,
    SCALES,
    VARIANT_LINES,
)
from studies.samplers.convergence import COUNTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from studies.samplers.results import Results

LINES = ("-", "-", "-", "-", "--", "--", "--", "--")

SOLVER_FAMILIES = {
    "single steps, and DPM-Solver++": ("ddim", "heun", "dpm_solver_pp", "dpm_solver_pp_singlestep"),
    "predictor-correctors": ("unipc", "dpm_solver_v3"),
    "multistep in the noise prediction": ("deis", "plms", "ghvb"),
    "momentum of first order": ("hb", "nesterov"),
}
"""Panels of the plot of slopes, with at most eight lines each."""

mpl.use("Agg")


def draw(results: Results, folder: Path) -> None:
    """Draw every plot for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    errors(results, folder / "errors.png")
    variants(results, folder / "v3.png")
    accuracy(results, folder / "accuracy.png")
    momentum(results, folder / "momentum.png")
    slopes(results, folder / "slopes.png")


def errors(results: Results, path: Path) -> None:
    """Error against evaluations for each guidance scale, with each sampler's better spacing."""
    _error_panels(results, ERROR_LINES, path, None)


def variants(results: Results, path: Path) -> None:
    """The same for variants of v3, all with the spacing ``logsnr``."""
    _error_panels(results, VARIANT_LINES, path, "logsnr")


def _error_panels(results: Results, labels: Sequence[str], path: Path, spacing: str | None) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.5), sharex=True, layout="constrained")
    for axis, scale in zip(axes.flat, SCALES, strict=True):
        for k, label in enumerate(labels):
            found = [
                results.better(label, n, scale)
                if spacing is None
                else results.errors(label, spacing, n, scale)
                for n in EVALUATIONS
            ]
            points = [
                (n, *mean_and_error(f.errors))
                for n, f in zip(EVALUATIONS, found, strict=True)
                if f is not None
            ]
            _line(axis, points, k, label)
        _log_evaluations(axis, EVALUATIONS)
        _log_figures(axis)
        axis.set_title(f"guidance {scale:g}" if scale > 1 else "no guidance")
    for axis in axes[1]:
        axis.set_xlabel("evaluations of the guided model")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the final latents")
    _finish(figure, axes.flat[0], path)


def accuracy(results: Results, path: Path) -> None:
    """Fraction of right pictures against evaluations, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for k, label in enumerate(ACCURACY_LINES):
        points: list[tuple[float, ...]] = []
        for n in PICTURE_EVALUATIONS:
            record = results.picture(label, n, PRACTICE_SCALE)
            if record is not None:
                right, of = sum(record["right"]), len(record["right"])
                low, high = wilson(right, of)
                # Shifted slightly, so that error bars do not overlap.
                aside = 1 + 0.012 * (k - len(ACCURACY_LINES) / 2)
                points.append((n * aside, right / of, right / of - low, high - right / of))
        _line(axis, points, k, label)
    _log_evaluations(axis, PICTURE_EVALUATIONS)
    axis.set_ylim(0, 1)
    axis.set_xlabel("evaluations of the guided model")
    axis.set_ylabel("share of captions drawn right")
    _finish(figure, axis, path)


def momentum(results: Results, path: Path) -> None:
    """Elements outside the clean range, and the error, by order at few evaluations."""
    figure, axes = plt.subplots(
        2, len(HIGH_SCALES), figsize=(13, 6.2), sharex=True, sharey="row", layout="constrained"
    )
    for column, scale in zip(axes.T, HIGH_SCALES, strict=True):
        for k, (family, members) in enumerate(FAMILIES.items()):
            found = [(order, results.picture(label, FEW[1], scale)) for order, label in members]
            shares = [(o, 100 * float(np.mean(r["beyond"]))) for o, r in found if r is not None]
            wrong = [(o, float(np.mean(r["errors"]))) for o, r in found if r is not None]
            _line(column[0], shares, k, family)
            _line(column[1], wrong, k, family)
        column[0].set_title(f"guidance {scale:g}")
        column[1].set_xlabel("order")
        for axis in column:
            _log_figures(axis)
            axis.set_xticks(range(1, 5))
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("% of elements beyond the range")
    axes[1, 0].set_ylabel("relative error")
    _finish(figure, axes[0, 1], path)


def slopes(results: Results, path: Path) -> None:
    """Error on the mixture against evaluations, one panel per family."""
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 9), sharex=True, sharey=True, layout="constrained"
    )
    records = list(results.of_part("slope"))
    for axis, (title, names) in zip(axes.flat, SOLVER_FAMILIES.items(), strict=True):
        members = [r for r in records if r["of"]["settings"]["name"] in names]
        for k, record in enumerate(members):
            name = f"{record['of']['label']} ({record['slope']:.2f})"
            _line(axis, list(zip(COUNTS, record["errors"], strict=True)), k, name)
        _log_evaluations(axis, COUNTS)
        _log_figures(axis)
        axis.set_title(title)
        if members:
            axis.legend(fontsize=8, loc="lower left")
    for axis in axes[1]:
        axis.set_xlabel("evaluations")
    for axis in axes[:, 0]:
        axis.set_ylabel("largest error on the Gaussian mixture")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axis: Axes, points: Sequence[Sequence[float]], k: int, label: str) -> None:
    """Draw a line; a point's third value is its error, or a third and fourth those on each side."""
    style: dict[str, Any] = {
        "color": COLORS[k % len(COLORS)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": LINES[k % len(LINES)],
        "markersize": 4.5,
        "linewidth": 1.4,
        "label": label,
    }
    if not points:
        return
    x, y, *bars = (np.array(column) for column in zip(*points, strict=True))
    if not bars:
        axis.plot(x, y, **style)
    else:
        axis.errorbar(
            x,
            y,
            yerr=bars[0] if len(bars) == 1 else np.stack(bars),
            capsize=2,
            elinewidth=0.8,
            **style,
        )


def _log_evaluations(axis: Axes, counts: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(list(counts))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)


def _log_figures(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _finish(figure: Any, axis: Axes, path: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(8, len(labels)), frameon=False
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""The plots of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from studies.common.intervals import mean_and_error, wilson
from studies.common.looks import COLORS, MARKERS
from studies.guidance import cells

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.guidance.results import Figures, Results

    Of = Callable[[float], Mapping[str, Any]]
    Point = tuple[float, float, float]
    Both = tuple[Figures, Figures | None]

mpl.use("Agg")


def _rule(name: str) -> Of:
    return lambda scale: {"name": name, "scale": scale}


FAMILIES: Mapping[str, tuple[Sequence[float], Of]] = {
    "cfg": (cells.SCALES, cells.cfg),
    "apg": (cells.HIGH_SCALES, cells.apg),
    "cfg, interval": (cells.HIGH_SCALES, lambda scale: cells.by(cells.cfg(scale), "interval")),
    "cfg_rescale": ((7.5, 20.0), _rule("cfg_rescale")),
    "dynamic_thresholding": ((7.5, 20.0), _rule("dynamic_thresholding")),
    "tcfg": ((7.5, 20.0), _rule("tcfg")),
    "magnitude_aware": (cells.HIGH_SCALES, cells.magnitude_aware),
}
"""Lines of the plots over the scale: scales, and the guidance at each."""

PLANE = {
    "cfg": FAMILIES["cfg"],
    "apg": FAMILIES["apg"],
    "cfg_plus_plus": (cells.PLUS_SCALES, cells.plus),
    "cfg, interval": FAMILIES["cfg, interval"],
    "cfg_rescale": FAMILIES["cfg_rescale"],
    "magnitude_aware": FAMILIES["magnitude_aware"],
}
"""Lines of the plot of accuracy against appearance."""

SAVING: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "adaptive": {f"{key:g}": one for key, one in cells.ADAPTIVE.items()},
    "guidance ends early": {f"{key:g}": one for key, one in cells.STOPPED.items()},
    "reuse": {f"{key}": one for key, one in cells.REUSED.items()},
    "linear_adaptive": {"": cells.LINEAR["linear_adaptive"]},
    "linear_adaptive, to the end": {"": cells.LINEAR["linear_adaptive, to the end"]},
    "interval (.28, 5.42]": {"": cells.INTERVALS["interval (.28, 5.42]"]},
}
"""Lines of the plot of savings, with their points by name."""


def draw(results: Results, folder: Path) -> None:
    """Draw every plot for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    scales(results, folder / "scales.png")
    plane(results, folder / "plane.png")
    savings(results, folder / "savings.png")
    few_steps(results, folder / "few_steps.png")
    perturbed(results, folder / "perturbed.png")


def scales(results: Results, path: Path) -> None:
    """Accuracy and appearance against the guidance scale."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    panels: tuple[tuple[str, Callable[[Both], Point | None]], ...] = (
        ("share of captions drawn right", lambda both: _share(both[0])),
        ("saturation, of the truth's", lambda both: _of_truth(results, both[0], "saturation")),
        ("contrast, of the truth's", lambda both: _of_truth(results, both[0], "contrast")),
        ("clipped values, %", lambda both: _percent(both[0], "clipped")),
        ("Fréchet distance beyond the truth's", lambda both: _farness(both[0])),
        ("distance between two seeds", lambda both: _apart(both[1])),
    )
    for axis, (title, value) in zip(axes.flat, panels, strict=True):
        for k, (name, (at, guidance)) in enumerate(FAMILIES.items()):
            found = [
                (s, results.found(guidance(s)), results.found(guidance(s), "again")) for s in at
            ]
            points = [
                (scale * (1 + 0.015 * (k - 2)), value((one, again)))
                for scale, one, again in found
                if one is not None
            ]
            _line(axis, [(x, p) for x, p in points if p is not None], k, name)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks(list(cells.SCALES))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    axes[1, 1].set_yscale("symlog")
    for axis in (axes[0, 1], axes[0, 2]):
        axis.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    for axis in axes[1]:
        axis.set_xlabel("guidance scale")
    _finish(figure, axes[0, 0], path)


def plane(results: Results, path: Path) -> None:
    """Accuracy against saturation and against the Fréchet distance, one line per rule."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for k, (name, (at, guidance)) in enumerate(PLANE.items()):
        found = [(scale, results.found(guidance(scale))) for scale in at]
        there = [(scale, one) for scale, one in found if one is not None]
        for axis, place in zip(axes, (_saturation_in(results), _farness), strict=True):
            points = [(s, p[0], _share(one)) for s, one in there if (p := place(one)) is not None]
            _line(axis, [(x, share) for _, x, share in points], k, name)
            for scale, x, (y, _, _) in points:
                axis.annotate(
                    f"{scale:g}",
                    (x, y),
                    (5, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=COLORS[k],
                )
    axes[0].set_xlabel("saturation, of the truth's")
    axes[0].axvline(1, color="#888888", linewidth=0.8, linestyle=":")
    axes[1].set_xlabel("Fréchet distance beyond the truth's")
    axes[1].set_xscale("symlog")
    axes[0].set_ylabel("share of captions drawn right")
    for axis in axes:
        axis.grid(alpha=0.25)
    _finish(figure, axes[0], path)


def savings(results: Results, path: Path) -> None:
    """Similarity to the images of full guidance against the evaluations saved."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, layout="constrained")
    full = results.found(cells.BASE)
    for k, (name, members) in enumerate(SAVING.items()):
        found = [(label, results.found(guidance)) for label, guidance in members.items()]
        there = [(label, one) for label, one in found if one is not None and one.values("psnr")]
        if full is None or not there:
            continue
        spent = [one.mean("evaluations") / full.mean("evaluations") for _, one in there]
        for axis, value in zip(axes, (_decibels, _share), strict=True):
            # Shifted slightly, so that error bars do not overlap.
            points = [
                (100 * (1 - s) + 0.25 * (k - 2), value(one))
                for s, (_, one) in zip(spent, there, strict=True)
            ]
            _line(axis, points, k, name)
            for (label, _), (x, (y, _, _)) in zip(there, points, strict=True):
                # Neighboring lines have their labels on opposite sides.
                axis.annotate(
                    label,
                    (x, y),
                    (5, -12 if k % 2 else 5),
                    textcoords="offset points",
                    fontsize=8,
                    color=COLORS[k],
                )
    if full is not None:
        axes[1].axhline(_share(full)[0], color="#888888", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("PSNR against full guidance, dB")
    axes[1].set_ylabel("share of captions drawn right")
    for axis in axes:
        axis.set_xlabel("evaluations saved, %")
        axis.grid(alpha=0.25)
    _finish(figure, axes[0], path)


def few_steps(results: Results, path: Path) -> None:
    """Accuracy of residual guidance against evaluations, at few steps."""
    lines: dict[str, Mapping[str, Any]] = {
        "none": cells.UNGUIDED,
        "cfg 2": cells.cfg(2.0),
        "cfg 4": cells.BASE,
    }
    for scale in cells.RESIDUAL_SCALES:
        lines[f"residual, cfg {scale:g}"] = cells.by(cells.cfg(scale), "residual", mode="onetime")
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for k, (name, guidance) in enumerate(lines.items()):
        found = [(n, results.found(guidance, steps=n)) for n in sorted(cells.FEW_STEPS)]
        points = [
            (one.mean("evaluations") * (1 + 0.012 * (k - 3)), _share(one))
            for _, one in found
            if one is not None
        ]
        _line(axis, points, k, name)
    axis.set_xscale("log")
    axis.set_xticks([2, 3, 4, 5, 8, 9, 16])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("evaluations, over 2, 4 and 8 steps")
    axis.set_ylabel("share of captions drawn right")
    axis.grid(alpha=0.25)
    _finish(figure, axis, path)


def perturbed(results: Results, path: Path) -> None:
    """Accuracy and Fréchet distance of each perturbation, with and without guidance."""
    names = ["nothing", *cells.PERTURBATIONS]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for k, (base_name, base) in enumerate((("no guidance", cells.UNGUIDED), ("cfg 4", cells.BASE))):
        found = [
            results.found(
                base if name == "nothing" else {**base, "perturbed": [cells.PERTURBATIONS[name]]}
            )
            for name in names
        ]
        for axis, value in zip(axes, (_share, _farness), strict=True):
            points = [
                (len(names) - i - 0.12 + 0.24 * (1 - k), p)
                for i, one in enumerate(found)
                if one is not None and (p := value(one)) is not None
            ]
            if points:
                y, bars = _columns(points)
                axis.errorbar(
                    bars[0],
                    y,
                    xerr=bars[1:],
                    fmt=MARKERS[k],
                    color=COLORS[k + 1],
                    capsize=2,
                    elinewidth=0.9,
                    label=base_name,
                )
    axes[0].set_yticks([len(names) - i for i in range(len(names))], names)
    axes[0].set_xlabel("share of captions drawn right")
    axes[1].set_xlabel("Fréchet distance beyond the truth's")
    for axis in axes:
        axis.grid(alpha=0.25)
    _finish(figure, axes[0], path)


def _share(figures: Figures) -> Point:
    right, of = figures.right
    low, high = wilson(right, of)
    return right / of, right / of - low, high - right / of


def _of_truth(results: Results, figures: Figures, name: str) -> Point | None:
    if results.truth is None:
        return None
    middle, low, high = figures.relative(results.truth, name)
    return middle, middle - low, high - middle


def _saturation_in(results: Results) -> Callable[[Figures], Point | None]:
    return lambda figures: _of_truth(results, figures, "saturation")


def _percent(figures: Figures, name: str) -> Point:
    mean, error = mean_and_error(figures.values(name))
    return 100 * mean, 196 * error, 196 * error


def _farness(figures: Figures) -> Point | None:
    if figures.beyond is None:
        return None
    value, deviation = figures.beyond
    return value, 1.96 * deviation, 1.96 * deviation


def _apart(again: Figures | None) -> Point | None:
    if again is None:
        return None
    mean, error = mean_and_error(again.values("apart"))
    return mean, 1.96 * error, 1.96 * error


def _decibels(figures: Figures) -> Point:
    mean, error = mean_and_error(figures.values("psnr"))
    return mean, 1.96 * error, 1.96 * error


def _columns(points: Sequence[tuple[float, Point]]) -> tuple[Any, Any]:
    return np.array([x for x, _ in points]), np.array([p for _, p in points]).T


def _line(axis: Axes, points: Sequence[tuple[float, Point]], k: int, label: str) -> None:
    if not points:
        return
    x, bars = _columns(points)
    axis.errorbar(
        x,
        bars[0],
        yerr=bars[1:],
        color=COLORS[k],
        marker=MARKERS[k],
        markersize=5,
        linewidth=1.3,
        capsize=2,
        elinewidth=0.7,
        label=label,
    )


def _finish(figure: Figure, axis: Axes, path: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)

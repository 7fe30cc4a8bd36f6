"""The page of the study: a template of prose, filled with tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from studies.common.page import fill
from studies.samplers import plots, tables
from studies.samplers.cells import HIGH_SCALES, SCALES, SPACED_SCALES, STRONG
from studies.samplers.cost import ROUNDS, STEPS
from studies.samplers.results import Results
from studies.samplers.sizes import Sizes

if TYPE_CHECKING:
    from studies.common.records import Records

TEMPLATE = Path(__file__).with_name("page.md")


def write(records: Records, path: Path, images: Path) -> None:
    """Write the page and its plots.

    Args:
        records: all results.
        path: path of the page.
        images: folder for the plots.
    """
    results = Results(records)
    plots.draw(results, images)
    fill(TEMPLATE, _entries(results), path)


def _entries(results: Results) -> dict[str, str]:
    return {
        "which": tables.which(results),
        **{f"errors_{_name(scale)}": tables.errors(results, scale) for scale in SCALES},
        "regret": tables.regret(results),
        "against": tables.against_the_best(results),
        "variants": tables.variants(results),
        "reduced": tables.reduced(results),
        "orders": tables.orders(results),
        "accuracy": tables.accuracy(results),
        **{f"spacings_{_name(s)}": tables.spacings(results, s) for s in SPACED_SCALES},
        "spacing_ratios": tables.spacing_ratios(results),
        "spaced_images": str(Sizes().spaced_images),
        "spaced_steps": str(Sizes().spaced_steps),
        **{f"momentum_{_name(s)}": tables.momentum(results, s) for s in HIGH_SCALES},
        "slopes": tables.slopes(results),
        "cost": tables.cost(results),
        "ticks": tables.ticks(results),
        "reference": tables.reference(results),
        "cross_check": tables.cross_check(results),
        "statistics": tables.statistics(results),
        "strong": f"{STRONG:g}",
        "error_images": tables.images(results, "error"),
        "accuracy_images": tables.images(results, "picture"),
        "reference_steps": f"{Sizes().reference_steps:,}",
        "rounds": str(ROUNDS),
        "steps": str(STEPS),
    }


def _name(scale: float) -> str:
    return f"{scale:g}".replace(".", "_")

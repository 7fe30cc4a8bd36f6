"""The page of the study: a template of prose, filled with tables."""

from __future__ import annotations

from pathlib import Path

from studies.common.page import fill
from studies.common.records import Records
from studies.guidance import inner_tables, plots, tables
from studies.guidance.decoders import DATA, decoders
from studies.guidance.results import Results

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
    entries = _entries(results) | {"decoders": decoders(records, Records(DATA))}
    fill(TEMPLATE, entries, path)


def _entries(results: Results) -> dict[str, str]:
    plain = (
        tables.scales,
        tables.plus,
        tables.plus_at_50,
        tables.apg_variants,
        tables.solved,
        tables.frequencies,
        tables.combined,
        tables.savings,
        tables.combined_savings,
        tables.few_steps,
        tables.from_pictures,
        tables.overlapping,
        tables.avoiding,
        tables.composed,
        inner_tables.perturbed,
        inner_tables.layers,
        inner_tables.background,
        inner_tables.confused,
        inner_tables.apart,
        inner_tables.particles,
        tables.rates,
        tables.quiet,
    )
    return {
        **{of.__name__: of(results) for of in plain},
        "rules_4": tables.rules(results, 4.0),
        "rules_7_5": tables.rules(results, 7.5),
        "rules_20": tables.rules(results, 20.0),
        "cells": f"{results.cells:,}",
        "images": f"{results.images:,}",
        "captions": str(results.captions),
        "true_distance": f"{results.true_distance:.2f}",
    }

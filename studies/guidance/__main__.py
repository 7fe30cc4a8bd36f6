"""Measure the effect and the cost of every guidance rule, policy and perturbation.

    python -m studies.guidance                  # measure what is missing, write the page
    python -m studies.guidance --minutes 30     # draw for half an hour at most
    python -m studies.guidance --parts rate     # only time the engine; on an idle machine
    python -m studies.guidance --page-only      # write the page from existing results

Results are lines of ``docs/data/guidance.jsonl``; a cell found there is not run again. The
page is ``docs/guidance.md`` with its plots in ``docs/images/guidance/``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from embedded import MODEL_FOLDER
from server.fitting.samples import prompts_for
from server.models.loading import load_model
from studies.common.records import Records
from studies.guidance.drawing import Drawing
from studies.guidance.measuring import PARTS, Share, measure, measure_rates
from studies.guidance.page import write
from studies.guidance.sitters import Sitters
from studies.guidance.study import Sizes, Study

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    options = _options(arguments)
    records = Records(options.data)
    if not options.page_only:
        torch.set_num_threads(options.threads)
        _measure(options, records)
    write(Records(options.data), options.page, options.images)


def _measure(options: argparse.Namespace, records: Records) -> None:
    sizes = replace(Sizes(), **{size.name: getattr(options, size.name) for size in fields(Sizes)})
    model = load_model(MODEL_FOLDER, name="embedded", device=options.device, dtype="float32")
    prompts = prompts_for(MODEL_FOLDER, None)
    drawing = Drawing(model, options.rows, sizes.fitted_runs, prompts, options.kept)
    sitters = Sitters(sizes.captions, sizes.again, sizes.known_pictures)
    weights = model.facts.revision
    try:
        study = Study(model, weights, drawing, sitters, sizes, options.kept)
        measure(study, records, options.parts, Share(*options.share), options.minutes)
        if "rate" in options.parts:
            measure_rates(drawing, sitters, weights, sizes, records)
    finally:
        drawing.stop()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.guidance")
    parser.add_argument("--page-only", action="store_true", help="write the page without measuring")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="maximum time to draw, in minutes"
    )
    parser.add_argument(
        "--share", nargs=2, type=int, default=Share(), help="first cell, and from it on every n-th"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32, help="rows in one forward pass")
    parser.add_argument("--data", type=Path, default=Path("docs/data/guidance.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/guidance.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images/guidance"))
    parser.add_argument(
        "--kept", type=Path, default=Path("out/guidance_study"), help="folder for latents"
    )
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Measure every sampler's error against a reference of 1,000 steps, and its accuracy on captions.

    python -m studies.samplers                  # measure what is missing, write the page
    python -m studies.samplers --minutes 30     # measure for half an hour at most
    python -m studies.samplers --page-only      # write the page from existing results

Results are lines of ``docs/data/samplers.jsonl``; a cell found there is not run again. The
page is ``docs/samplers.md`` with its plots in ``docs/images/samplers/``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.architectures import build
from embedded import MODEL_FOLDER
from server.models.folder import revisions_of
from server.models.loading import load_model
from studies.common.records import Records
from studies.samplers.cells import EVERY, EVERY_EVALUATIONS, HIGH_SCALES, SCALES
from studies.samplers.measuring import PARTS, Wanted, measure
from studies.samplers.page import write
from studies.samplers.sizes import Sizes
from studies.samplers.statistics_files import StatisticsFiles
from studies.samplers.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    options = _options(arguments)
    records = Records(options.data)
    if not options.page_only:
        torch.set_num_threads(options.threads)
        model = load_model(MODEL_FOLDER, name="embedded", device=options.device, dtype="float32")
        statistics = StatisticsFiles(options.statistics)
        # The revision of the whole folder would change with the statistics.
        weights = revisions_of(MODEL_FOLDER / "unet").weights
        study = Study(model, weights, statistics, _sizes(options), options.kept)
        timed = model
        if options.architecture != "embedded":
            timed = build(options.architecture, options.device, "auto").hosted
        wanted = Wanted(options.parts, options.contenders, options.scales, options.evaluations)
        measure(study, model, timed, statistics, records, wanted, options.minutes)
    write(Records(options.data), options.page, options.images)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.samplers")
    parser.add_argument("--page-only", action="store_true", help="write the page without measuring")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--contenders", nargs="+", choices=EVERY, default=tuple(EVERY))
    parser.add_argument("--scales", nargs="+", type=float, default=(*SCALES, *HIGH_SCALES))
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVERY_EVALUATIONS)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="maximum time to measure, in minutes"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--architecture",
        choices=("embedded", "sd15"),
        default="embedded",
        help="model whose forward pass costs are compared with",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("docs/data/samplers.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/samplers.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images/samplers"))
    parser.add_argument(
        "--kept", type=Path, default=Path("out/samplers"), help="folder for references"
    )
    parser.add_argument("--statistics", type=Path, default=MODEL_FOLDER / "weft")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    return parser.parse_args(arguments)


def _sizes(options: argparse.Namespace) -> Sizes:
    return replace(Sizes(), **{size.name: getattr(options, size.name) for size in fields(Sizes)})


if __name__ == "__main__":
    main()

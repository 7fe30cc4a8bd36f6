"""The errors of samplers of your choice at equal numbers of evaluations."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from embedded import MODEL_FOLDER
from server.models.folder import revisions_of
from server.models.loading import load_model
from studies.common.intervals import mean_and_error, ratio
from studies.samplers.cells import SPACINGS_COMPARED, Cell, Contender
from studies.samplers.sizes import Sizes
from studies.samplers.statistics_files import Missing, StatisticsFiles
from studies.samplers.study import Study

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from studies.samplers.cells import Part

REFERENCE_STEPS = 250
"""Steps of the reference; with the study's 1,000, errors change by less than 1 %."""
PART: Part = "error"


def compare(command: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Measure, and print one table for each guidance scale.

    Args:
        command: parser to which further arguments are added.
        arguments: command-line arguments; None for those of the process.
    """
    options = _options(command, arguments)
    torch.set_num_threads(options.threads)
    model = load_model(MODEL_FOLDER, name="embedded", device=options.device, dtype="float32")
    study = Study(
        model,
        revisions_of(MODEL_FOLDER / "unet").weights,
        StatisticsFiles(MODEL_FOLDER / "weft"),
        replace(Sizes(), error_images=options.images, reference_steps=options.reference_steps),
        options.kept,
    )
    for scale in options.scales:
        for line in table(study, options.samplers, options.spacings, options.evaluations, scale):
            print(line, flush=True)


def table(
    study: Study,
    contenders: Sequence[Contender],
    spacings: Sequence[str],
    evaluations: Sequence[int],
    scale: float,
) -> Iterator[str]:
    """Lines of a table: mean error, its standard error, and the ratio of the first one's error.

    Args:
        study: the model with its prompts and references.
        contenders: samplers; the first is compared with each of the others.
        spacings: names of spacings.
        evaluations: numbers of evaluations of the guided model.
        scale: scale of classifier-free guidance; 1 is no guidance.
    """
    first = contenders[0].label
    yield ""
    yield f"Guidance {scale:g}: error, and in brackets that of `{first}` divided by it (95 %)"
    yield ""
    yield f"| sampler | spacing | {' | '.join(map(str, evaluations))} |"
    yield f"| --- | --- |{' --- |' * len(evaluations)}"
    for spacing in spacings:
        firsts: list[list[float] | str] = []
        for contender in contenders:
            cells = (
                Cell(PART, contender, spacing, count, scale, study.sizes.error_images)
                for count in evaluations
            )
            found = [_errors(study, cell) for cell in cells]
            firsts = firsts or found
            shown = (
                _shown(own, None if contender is contenders[0] else against)
                for own, against in zip(found, firsts, strict=True)
            )
            yield f"| {contender.label} | {spacing} | {' | '.join(shown)} |"


def contender(text: str) -> Contender:
    """A sampler given as in a request: a name, or JSON with its settings.

    Raises:
        argparse.ArgumentTypeError: there is no such sampler, or a setting is invalid.
    """
    try:
        settings = json.loads(text) if text.startswith("{") else {"name": text}
        found = Contender(text, settings)
        sampler = found.sampler(1.0)
    except (Missing, ValidationError, KeyError, json.JSONDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return replace(found, kept="elementwise" if sampler.uses_statistics else "")


def _errors(study: Study, cell: Cell) -> list[float] | str:
    """The error of each image, or the reason why there are none."""
    try:
        return study.run(cell)["errors"]
    except Missing as missing:
        return str(missing)
    except ValueError:
        return "no such run"


def _shown(own: list[float] | str, against: list[float] | str | None) -> str:
    if isinstance(own, str):
        return own
    mean, error = mean_and_error(own)
    shown = f"{mean:.3g} ± {error:.1g}"
    if not isinstance(against, list):
        return shown
    middle, low, high = ratio(against, own)
    return f"{shown} ({middle:.2f}, {low:.2f} to {high:.2f})"


def _options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser.add_argument("samplers", nargs="+", type=contender, help="names, or JSON with settings")
    parser.add_argument("--evaluations", nargs="+", type=int, default=(5, 8, 12, 20))
    parser.add_argument("--scales", nargs="+", type=float, default=(1.0, 4.0))
    parser.add_argument("--spacings", nargs="+", default=SPACINGS_COMPARED)
    parser.add_argument("--images", type=int, default=Sizes().error_images)
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--kept", type=Path, default=Path("out/samplers"), help="folder for references"
    )
    return parser.parse_args(arguments)

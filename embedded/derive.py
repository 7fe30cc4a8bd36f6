"""Recompute the files derived from the embedded model's weights: `python -m embedded.derive`.

    statistics  model statistics at some guidance scales, for DPM-Solver-v3
    linear_ag   coefficients of linear adaptive guidance, for some samplers and step counts
    classifier  a classifier of the model's latents, for classifier guidance

An interrupted run resumes when the same command is given again; for the classifier it resumes after
labelling. `--check` computes nothing and reports whether the files belong to the weights.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from embedded import MODEL_FOLDER
from embedded.classifier_training import Labeled, accuracy, make_labeled, train_classifier
from embedded.report import load_pipeline
from embedded.scenes import make_scene, render
from samplers.model_statistics import SamplesDone
from samplers.statistics import read_identity, schedule_fingerprint
from server.errors import InvalidRequest, ModelMismatch
from server.fitting.linear_guidance import Runs, store
from server.fitting.model_statistics import Size, make_statistics, mixture_of
from server.fitting.samples import Samples, prompts_for
from server.models.classifier import LatentClassifier
from server.models.folder import classifier_file, statistics_file
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.checks.guidance import coefficients_for
from server.requests.resolve import make_plan, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.settings import Limits

SCALES: Final = (1.0, 2.0, 4.0, 7.5)
"""Guidance scales for which statistics are shipped; 1 is the prompt alone."""

FITTED: Final = (
    {"steps": 25, "guidance": {"name": "apg", "scale": 4.0, "policy": "linear_adaptive"}},
    {"steps": 25, "guidance": {"name": "cfg", "scale": 4.0, "policy": "linear_adaptive"}},
    {"steps": 25, "guidance": {"name": "cfg", "scale": 7.5, "policy": "linear_adaptive"}},
    {
        "sampler": "unipc",
        "steps": 12,
        "guidance": {"name": "cfg", "scale": 4.0, "policy": "linear_adaptive"},
    },
)
"""Runs for which coefficients of linear adaptive guidance are shipped, as in requests."""

JUDGED_AT: Final = (None, 100, 300, 500, 700, 900)
"""Timesteps at whose noise level the classifier's accuracy is reported; None is no noise."""

_TESTED: Final = 15
"""One in this many labeled pictures is reserved for measuring the accuracy."""
_CLASSIFIER_SEED: Final = 0
_FIRST_SEED: Final = 6_000_000_000
_REPORT_EVERY_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class DerivedPart:
    """Something derived from the weights.

    Attributes:
        make: computes and stores it.
        stale: returns one sentence for each file that is missing or belongs to other weights.
    """

    make: Callable[[HostedModel, argparse.Namespace], None]
    stale: Callable[[HostedModel, Path], list[str]]


def make_all_statistics(model: HostedModel, options: argparse.Namespace) -> None:
    """Compute the statistics for all scales on new pictures, and store them."""
    size = Size(points=options.points, samples=options.samples)
    made = make_statistics(
        model,
        pictures(model, size.samples),
        SCALES,
        size,
        checkpoint=options.out / f"statistics-{model.facts.denoiser}-{size.points}",
        on_progress=_Reporter("statistics"),
    )
    for scale, statistics in zip(SCALES, made, strict=True):
        file = statistics_file(options.model, mixture_of(scale).rule, scale)
        statistics.save(file)
        print(f"wrote {file}", flush=True)


@torch.no_grad()
def pictures(model: HostedModel, count: int) -> Samples:
    """Encoded pictures that were not used in training, with their captions."""
    scenes = [make_scene(_FIRST_SEED + k) for k in range(count)]
    parts = (scenes[k : k + 32] for k in range(0, count, 32))
    chunks = [model.encode_image(render(part, model.device)) for part in parts]
    return Samples(torch.cat(chunks), [scene.caption for scene in scenes])


def stale_statistics(model: HostedModel, folder: Path) -> list[str]:
    """What is wrong with the stored statistics."""
    schedule = schedule_fingerprint(model.default_schedule)
    found: list[str] = []
    for scale in SCALES:
        file = statistics_file(folder, mixture_of(scale).rule, scale)
        try:
            identity = read_identity(file)
            if identity is None:
                raise ValueError("statistics say nothing of the model they are of.")
            identity.check(model.facts.denoiser, schedule)
        except ValueError as error:
            found.append(f"{file.name}: {error}")
    return found


def make_linear_ag(model: HostedModel, options: argparse.Namespace) -> None:
    """Fit linear adaptive guidance to the runs in ``FITTED``, and store the coefficients."""
    prompts = prompts_for(MODEL_FOLDER, None)
    for fields in FITTED:
        report = _Reporter(f"linear_ag {fields}")
        request = _resolved(model, fields)
        file = store(
            model,
            options.model,
            request,
            prompts,
            Runs(options.runs),
            lambda _, done, total, report=report: report(SamplesDone(done, total)),
        )
        print(f"wrote {file}", flush=True)


def stale_linear_ag(model: HostedModel, _folder: Path) -> list[str]:
    """The runs without coefficients for these weights."""
    found: list[str] = []
    for fields in FITTED:
        request = _resolved(model, fields)
        layout = request.sampler, request.spacing, request.steps
        plan = make_plan(model.default_schedule, *layout, None)
        try:
            coefficients_for(request, model, plan)
        except InvalidRequest:
            found.append(f"linear_ag has no coefficients of these weights for {fields}.")
    return found


def make_classifier(model: HostedModel, options: argparse.Namespace) -> None:
    """Label new pictures, train on most of them, report the accuracy on the rest, and store it."""
    revision = model.facts.denoiser
    data = _labeled(options, options.out / f"labelled-{revision}-{options.labelled}.safetensors")
    tested = max(1, options.labelled // _TESTED)
    learnt, unseen = data.parted(len(data.latents) - tested)
    report = _Reporter("classifier")
    classifier = train_classifier(
        learnt,
        revision,
        options.steps,
        _CLASSIFIER_SEED,
        lambda step, _: report(SamplesDone(step, options.steps)),
    )
    for timestep in JUDGED_AT:
        shares = accuracy(classifier, unseen, timestep)
        summary = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"timestep {timestep}: {summary}", flush=True)
    file = classifier_file(options.model)
    classifier.save(file)
    print(f"wrote {file}", flush=True)


def _labeled(options: argparse.Namespace, file: Path) -> Labeled:
    if file.exists():
        return Labeled.load(file)
    pipeline = load_pipeline(options.model, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    data = make_labeled(pipeline, options.labelled)
    data.save(file)
    return data


def stale_classifier(model: HostedModel, folder: Path) -> list[str]:
    """What is wrong with the stored classifier."""
    try:
        LatentClassifier.load(classifier_file(folder)).check(model.facts.denoiser)
    except ModelMismatch as error:
        return [str(error)]
    return []


def _resolved(model: HostedModel, fields: Mapping[str, Any]) -> ResolvedRequest:
    request = GenerateRequest.model_validate({"prompt": "", **fields})
    return resolve(request, model, Limits(), None)


PARTS: Final[dict[str, DerivedPart]] = {
    "statistics": DerivedPart(make_all_statistics, stale_statistics),
    "linear_ag": DerivedPart(make_linear_ag, stale_linear_ag),
    "classifier": DerivedPart(make_classifier, stale_classifier),
}


class _Reporter:
    """Prints the progress of a part from time to time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._first: SamplesDone | None = None
        self._reported_at = 0.0

    def __call__(self, progress: SamplesDone) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = progress, now
        if now - self._reported_at < _REPORT_EVERY_S and progress.done < progress.total:
            return
        self._reported_at = now
        fresh = progress.done - self._first.done
        left = (now - self._started) / fresh * (progress.total - progress.done) if fresh else 0.0
        print(
            f"{self._name}: {progress.done} of {progress.total}, "
            f"{(now - self._started) / 60:.1f} minutes, {left / 60:.1f} to go",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="embedded.derive", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all by default"
    )
    parser.add_argument("--check", action="store_true", help="only report what is missing or stale")
    parser.add_argument(
        "--points", type=int, default=80, help="number of noise levels of the statistics"
    )
    parser.add_argument("--samples", type=int, default=128, help="noised images at each level")
    parser.add_argument(
        "--runs", type=int, default=96, help="guided runs to fit to, for each sampler"
    )
    parser.add_argument(
        "--labelled", type=int, default=7500, help="labelled images for the classifier"
    )
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the classifier")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/derive"), help="folder for checkpoints"
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))} is no part; there are {', '.join(PARTS)}.")
    return options


def main() -> int:
    """Make or check the requested parts; the exit status is 1 if a check finds anything."""
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model, name="embedded", device=options.device, dtype="float32")
    chosen = [PARTS[name] for name in options.parts or PARTS]
    if not options.check:
        for part in chosen:
            part.make(model, options)
    stale = [sentence for part in chosen for sentence in part.stale(model, options.model)]
    for sentence in stale:
        print(f"{sentence} `python -m embedded.derive` makes it again.")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Distil the embedded model for few steps: `python -m embedded.distil student`, or `adapter`.

    student  a U-Net conditioned on the guidance scale, in a latent consistency model's folder
    adapter  an LCM-LoRA of the embedded model, for one guidance scale
    report   measures both on captions that were not trained on, and writes DISTILLED.md

A training run ends after `--steps` or `--minutes`, whichever comes first; with `--resume` it
continues where it was stopped.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch.nn.utils import parametrize

from embedded import ADAPTER_FILE, MODEL_FOLDER, STUDENT_FOLDER
from embedded.components import (
    Components,
    load_components,
    make_few_step_scheduler,
    make_tokenizer,
    save_student,
)
from embedded.consistency_training import Distillation, distil, student_of
from embedded.low_rank import add_low_rank, fuse, save_low_rank
from embedded.report import Sampling, Score, score_model, unseen_scenes
from embedded.unet_training import corpus_of, training_captions

STEPS: Final = (1, 2, 4)
"""Numbers of sampling steps at which results are measured."""
STUDENT_SCALES: Final = (2.0, 7.0)
"""Guidance scales that the student learns."""
DEFAULT_SCALE: Final = 2.0
"""Default scale in the student's folder; at higher ones large objects merge."""
ADAPTER_SCALE: Final = 4.0
"""Guidance scale at which the adapter is distilled."""
RANK: Final = 32

_REPORT: Final = Path(__file__).parent / "DISTILLED.md"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="embedded.distil", description=__doc__)
    parser.add_argument("what", choices=["student", "adapter", "report"])
    parser.add_argument("--minutes", type=float, help="end after so many minutes")
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--batch", type=int, default=32, help="latents a step")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--pictures", type=int, default=12_000, help="training pictures")
    parser.add_argument(
        "--intervals", type=int, default=6, help="of the 50 times, how many lie up to the target"
    )
    parser.add_argument(
        "--solver-steps", type=int, default=3, help="DDIM steps of the teacher up to the target"
    )
    parser.add_argument("--loss", choices=["cauchy", "huber"], default="cauchy")
    parser.add_argument("--width", type=float, default=0.2, help="of the loss, in deviations")
    parser.add_argument(
        "--target-decay", type=float, default=0.95, help="running average that targets come from"
    )
    parser.add_argument(
        "--average-decay", type=float, default=0.999, help="running average that is kept"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    parser.add_argument(
        "--publish-minutes", type=float, default=10.0, help="minutes between previews"
    )
    parser.add_argument("--captions", type=int, default=40, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path("out/distil"), help="for checkpoints")
    parser.add_argument("--teacher", type=Path, default=MODEL_FOLDER, help="model folder")
    parser.add_argument("--student", type=Path, default=STUDENT_FOLDER, help="folder to write")
    parser.add_argument("--adapter", type=Path, default=ADAPTER_FILE, help="file to write")
    return parser.parse_args()


def main() -> int:
    """Distil and print the scores of previews, or write the report."""
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.steps is None and options.minutes is None:
        options.steps = 4_000
    if options.what == "report":
        _report(options)
        return 0
    torch.manual_seed(options.seed)
    is_student = options.what == "student"
    teacher = load_components(options.teacher)
    settings = Distillation(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        rate=options.rate,
        scales=STUDENT_SCALES if is_student else (ADAPTER_SCALE, ADAPTER_SCALE),
        intervals=options.intervals,
        solver_steps=options.solver_steps,
        loss=options.loss,
        width=options.width,
        target_decay=options.target_decay,
        average_decay=options.average_decay,
        device=options.device,
        seed=options.seed,
        publish_minutes=options.publish_minutes,
    )
    corpus = corpus_of(
        teacher.autoencoder, options.pictures, options.device, options.out / "corpus.safetensors"
    )
    checkpoint = options.out / f"{options.what}.safetensors"
    if not options.resume:
        checkpoint.unlink(missing_ok=True)
    student = student_of(teacher.unet) if is_student else copy.deepcopy(teacher.unet)
    if not is_student:
        add_low_rank(student, RANK)
    known = frozenset(text for texts in training_captions(options.pictures) for text in texts)

    def publish(average: UNet2DConditionModel, step: int) -> None:
        if is_student:
            parts = Components(teacher.autoencoder, average, teacher.text_encoder)
            save_student(parts, options.student, DEFAULT_SCALE)
        else:
            save_low_rank(average, options.adapter)
        print(f"published step {step}\n{_glance(average, teacher, options, known)}", flush=True)

    distil(teacher, student, settings, corpus, checkpoint, publish)
    return 0


def _glance(
    average: UNet2DConditionModel,
    teacher: Components,
    options: argparse.Namespace,
    known: frozenset[str],
) -> str:
    """Scores of the student on unseen captions at few steps, as a table."""
    plain = copy.deepcopy(average)
    for module in plain.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    scale = DEFAULT_SCALE if options.what == "student" else 1.0
    pipeline = _pipeline(plain, teacher).to(options.device)
    scores = {steps: _scores(pipeline, steps, scale, options.captions, known) for steps in STEPS}
    return _table(scores, "steps")


def _report(options: argparse.Namespace) -> None:
    """Measure the shipped models, with pictures drawn by diffusers' own pipelines."""
    known = frozenset(text for texts in training_captions(options.pictures) for text in texts)
    student: Any = LatentConsistencyModelPipeline.from_pretrained(options.student)
    adapted = load_components(options.teacher)
    fuse(load_file(options.adapter), adapted.unet)
    systems: dict[str, tuple[Any, float]] = {
        "student": (student, DEFAULT_SCALE),
        "student, scale 4": (student, 4.0),
        "adapter": (_pipeline(adapted.unet, adapted), 1.0),
    }
    scores = {
        f"{name} | {steps}": _scores(pipeline, steps, scale, options.captions, known)
        for name, (pipeline, scale) in systems.items()
        for steps in sorted(STEPS, reverse=True)
    }
    # The text after the table is written by hand and kept.
    _, heading, training = _REPORT.read_text().partition("\n## Training\n")
    _REPORT.write_text(
        f"""# Few steps

What was distilled from the embedded model, on captions that were not trained on
({options.captions} of each kind): `embedded-lcm`, the student, at its default guidance scale of
{DEFAULT_SCALE:g} and at 4, and the adapter `embedded-lcm-lora` on the embedded model. Drawn by
diffusers' `LatentConsistencyModelPipeline`, and for the adapter by `StableDiffusionPipeline` with
`LCMScheduler`; read by `embedded/checker.py`. A picture is right if every attribute that its
caption mentions is.

{_table(scores, "model | steps")}

Written by `python -m embedded.distil {" ".join(sys.argv[1:])}`.
{heading}{training}"""
    )
    print(f"wrote {_REPORT}")


def _pipeline(unet: UNet2DConditionModel, teacher: Components) -> Any:
    """The pipeline of diffusers that works with and without an embedding of the scale."""
    parts: dict[str, Any] = {
        "vae": teacher.autoencoder,
        "text_encoder": teacher.text_encoder,
        "tokenizer": make_tokenizer(),
        "unet": unet,
        "scheduler": make_few_step_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _scores(
    pipeline: Any, steps: int, scale: float, captions: int, known: frozenset[str]
) -> tuple[Score, Score]:
    """Scores over captions of one and of two objects."""
    sampling = Sampling(steps=steps, scale=scale)
    one, two = (
        score_model(pipeline, unseen_scenes(things, captions, known), sampling)[0]
        for things in (1, 2)
    )
    return one, two


def _table(scores: Mapping[Any, tuple[Score, Score]], first: str) -> str:
    """Fractions of pictures in which everything is right, as a Markdown table."""
    columns = first.count("|") + 3
    lines = [f"| {first} | one object | two objects |", "|---" * columns + "|"]
    for name, (one, two) in scores.items():
        lines.append(f"| {name} | {one.share():.1%} | {two.share():.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

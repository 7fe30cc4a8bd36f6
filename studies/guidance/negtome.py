"""Measure how far negative token merging pushes images away from a picture of their caption.

    python -m studies.guidance.negtome --captions 60

Prints one table. The pictures of a caption start from the same noise with every setting, and are
pushed away from the data set's own picture of the caption, towards which the caption leads.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.engine_runs import run_tasks, start_engine
from embedded import MODEL_FOLDER
from embedded.checker import compare, read_picture
from embedded.report import unseen_scenes
from embedded.scenes import render
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from studies.common.intervals import DEVIATIONS, mean_and_error, wilson
from studies.guidance.measures import distances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from embedded.scenes import Scene
    from server.engine.engine import Engine
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel

SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"stop": 1.0},
    {"stop": 1.0, "strength": 3},
    {"stop": 1.0, "strength": 10},
)
SCALE = 4
"""Scale of CFG at which the embedded model draws captions best."""
ROWS = 24


def tasks_for(
    model: HostedModel,
    scenes: Sequence[Scene],
    shown: Tensor,
    negtome: dict[str, Any] | None,
    steps: int,
) -> list[ImageTask]:
    """Tasks for one image per scene, created as the service does.

    Args:
        model: model that draws.
        scenes: scenes whose captions are drawn.
        shown: pictures to push away from, ``[scenes, 3, H, W]`` in [-1, 1].
        negtome: settings of negative token merging; None for none.
        steps: number of steps of the sampler.
    """
    tasks: list[ImageTask] = []
    for seed, (scene, picture) in enumerate(zip(scenes, shown, strict=True)):
        guidance: dict[str, Any] = {"name": "cfg", "scale": SCALE}
        given = {"prompt": scene.caption, "steps": steps, "seed": seed, "guidance": guidance}
        if negtome is not None:
            guidance["negtome"] = negtome
            given["reference"] = "sent"
        resolved = resolve(GenerateRequest.model_validate(given), model, Limits(), None)
        layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
        plan = make_plan(model.default_schedule, *layout)
        reference = None if negtome is None else picture
        tasks += tasks_of(prepare(resolved, model, plan), model, reference=reference)
    return tasks


def table(model: HostedModel, engine: Engine, count: int, steps: int) -> None:
    """Print how far each setting pushes images away from the picture, and how many are right."""
    scenes = [
        scene for things in (1, 2) for scene in unseen_scenes(things, count // 2, frozenset())
    ]
    shown = render(scenes)
    target = model.encode_image(shown)
    print("| keeps away | distance of latents | change, 95 % interval | moved | all right |")
    print("|---|---|---|---|---|")
    first: Tensor | None = None
    for negtome in (None, *SETTINGS):
        results = run_tasks(engine, tasks_for(model, scenes, shown, negtome, steps))
        pictures = [result.pixels for _, result in sorted(results.items())]
        latents = model.encode_image(_as_input(pictures))
        first = latents if first is None else first
        distance, before = distances(latents, target), distances(first, target)
        change, error = mean_and_error(np.subtract(distance, before))
        right = sum(
            all(compare(scene.claim, read_picture(picture)).values())
            for scene, picture in zip(scenes, pictures, strict=True)
        )
        low, high = wilson(right, len(scenes))
        print(
            f"| {_described(negtome)} | {np.mean(distance):.3f} "
            f"| {change:+.3f} +- {DEVIATIONS * error:.3f} "
            f"| {np.mean(distances(latents, first)):.3f} "
            f"| {right} of {len(scenes)}, {low:.0%} to {high:.0%} |",
            flush=True,
        )


def _as_input(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _described(negtome: dict[str, Any] | None) -> str:
    if negtome is None:
        return "no"
    return ", ".join(f"{field} {value}" for field, value in negtome.items()) or "the defaults"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.guidance.negtome")
    parser.add_argument(
        "--captions", type=int, default=60, help="number, half of one object and half of two"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
    engine = start_engine(model, ROWS, options.captions)
    try:
        with torch.inference_mode():
            table(model, engine, options.captions, options.steps)
    finally:
        engine.stop(0)


if __name__ == "__main__":
    main()

"""Measure what a step cache saves, and how it changes the images of the embedded model.

    python -m benchmarks.step_cache
    python -m benchmarks.step_cache --threads 1 --processor-time     # beside other work

Draws the same captions with the same seeds and settings, with and without a cache, all images of a
setting at once. Prints one Markdown table for each sampler, guidance and number of steps: images
per second and their ratio to those without a cache, evaluations per image, PSNR to the images
without a cache, and the number of images that show what their captions claim according to the data
set's own checker. The last rows are runs without a cache that take about as few evaluations.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from statistics import mean, median, stdev
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.engine_runs import run_tasks, start_engine
from benchmarks.likeness import psnr
from embedded import MODEL_FOLDER
from embedded.checker import compare, read_picture
from embedded.report import unseen_scenes
from embedded.unet_training import training_captions
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from embedded.scenes import Scene
    from server.engine.engine import Engine
    from server.engine.state.sequence import ImageResult
    from server.models.hosted import HostedModel

APG: Mapping[str, Any] = {"name": "apg", "scale": 4.0}
REUSE: Mapping[str, Any] = {**APG, "policy": {"name": "reuse", "every": 2}}
THRESHOLDS = (0.05, 0.1, 0.2)
MAX_PENDING = 1024
KNOWN_PICTURES = 12_000
"""Number of training pictures whose captions are excluded."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The common settings of the requests of one table.

    Attributes:
        sampler: name of the sampler.
        guidance: guidance of the requests.
        steps: number of steps.
        fewer: numbers of steps without a cache to compare with.
        thresholds: thresholds of the caches.
    """

    sampler: str
    guidance: Mapping[str, Any]
    steps: int
    fewer: tuple[int, ...]
    thresholds: tuple[float, ...] = THRESHOLDS


SETTINGS = (
    Setting("dpm_solver_pp", APG, 50, (26, 19)),
    Setting("dpm_solver_pp", APG, 25, (18, 13)),
    Setting("dpm_solver_pp", APG, 10, (8,), (0.1, 0.2)),
    Setting("euler", APG, 25, (18,), (0.1, 0.2)),
    Setting("dpm_solver_pp", REUSE, 25, (), (0.1,)),
)


@dataclass(frozen=True, slots=True)
class DrawnImages:
    """Images of one kind of request, in the order of the captions."""

    results: list[ImageResult]
    seconds: float

    @property
    def pixels(self) -> list[NDArray[np.uint8]]:
        """Pixels of each image."""
        return [result.pixels for result in self.results]


class Artist:
    """An engine with the embedded model, and the captions that it draws."""

    def __init__(
        self, model: HostedModel, scenes: Sequence[Scene], clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._scenes = scenes
        self._clock = clock
        self._engine: Engine = start_engine(model, None, MAX_PENDING)

    def draw(self, fields: Mapping[str, Any]) -> DrawnImages:
        """Draw all captions at once, each with its index as the seed."""
        tasks = [
            task
            for seed, scene in enumerate(self._scenes)
            for task in self._tasks({**fields, "prompt": scene.caption, "seed": seed})
        ]
        began = self._clock()
        results = run_tasks(self._engine, tasks)
        seconds = self._clock() - began
        return DrawnImages([result for _, result in sorted(results.items())], seconds)

    def stop(self) -> None:
        """End the engine's thread."""
        self._engine.stop(0)

    def _tasks(self, fields: Mapping[str, Any]) -> Any:
        """Tasks of a request, created as the service does."""
        resolved = resolve(GenerateRequest.model_validate(fields), self._model, Limits(), None)
        layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
        plan = make_plan(self._model.default_schedule, *layout)
        return tasks_of(prepare(resolved, self._model, plan), self._model)


def main() -> None:
    """Draw, and print the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    model = load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
    known = frozenset(text for texts in training_captions(KNOWN_PICTURES) for text in texts)
    scenes = [
        scene
        for pair in zip(
            *(unseen_scenes(n, options.captions // 2, known) for n in (1, 2)), strict=True
        )
        for scene in pair
    ]
    clock, unit = (process_time, "processor ") if options.processor_time else (perf_counter, "")
    artist = Artist(model, scenes, clock)
    artist.draw({"steps": 2})
    print(
        f"embedded, {options.threads} threads of {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}; {len(scenes)} captions, {options.rounds} rounds"
    )
    for setting in SETTINGS:
        _table(artist, scenes, setting, options.rounds, unit)
    artist.stop()


def _table(
    artist: Artist, scenes: Sequence[Scene], setting: Setting, rounds: int, unit: str
) -> None:
    own = {"sampler": setting.sampler, "guidance": setting.guidance, "steps": setting.steps}
    kinds: dict[str, dict[str, Any]] = {"no cache": own}
    for threshold in setting.thresholds:
        cache = {"name": "easy_cache", "threshold": threshold}
        kinds[f"`easy_cache` {threshold:g}"] = {**own, "cache": cache}
    kinds |= {f"{steps} steps, no cache": {**own, "steps": steps} for steps in setting.fewer}
    drawn: dict[str, list[DrawnImages]] = {label: [] for label in kinds}
    for _ in range(rounds):
        for label, fields in kinds.items():
            drawn[label].append(artist.draw(fields))
    policy = setting.guidance.get("policy")
    with_policy = f" with {policy['name']} {policy['every']}" if policy else ""
    print(f"\n{setting.steps} steps of {setting.sampler}, apg 4{with_policy}\n")
    print(f"| | images / {unit}s | | evaluations | PSNR, dB | worst tenth | right |")
    print("|---|---|---|---|---|---|---|")
    full = drawn["no cache"]
    for label, rows in drawn.items():
        rate = median(len(scenes) / one.seconds for one in rows)
        gain = median(a.seconds / b.seconds for a, b in zip(full, rows, strict=True))
        evaluations = mean(result.evaluations for result in rows[0].results)
        likeness = "- | -" if label == "no cache" else _likeness(rows[0], full[0])
        right = sum(map(_is_right, scenes, rows[0].pixels))
        print(
            f"| {label} | {rate:.2f} | {gain:.2f} x | {evaluations:.1f} | {likeness} | "
            f"{right} of {len(scenes)} |",
            flush=True,
        )


def _likeness(drawn: DrawnImages, wanted: DrawnImages) -> str:
    found = sorted(map(psnr, drawn.pixels, wanted.pixels))
    error = stdev(found) / len(found) ** 0.5
    return f"{mean(found):.1f} ± {error:.1f} | {found[len(found) // 10]:.1f}"


def _is_right(scene: Scene, pixels: NDArray[np.uint8]) -> bool:
    return all(compare(scene.claim, read_picture(pixels)).values())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cache")
    parser.add_argument("--captions", type=int, default=48, help="of one thing and of two in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's own time, on a CPU that is busy with others; with --threads 1",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""One stage of the images of a tick: evaluate, guide, advance, and write only at the end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import isfinite
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from server.engine.tick import recall, weave
from server.engine.tick.resampling import resample
from server.engine.tick.stopwatch import Stopwatch
from server.errors import RowFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from server.engine.state.batch import Batch
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence
    from server.engine.tick.recall import CacheDecision
    from server.engine.tick.resampling import Resampling
    from server.engine.tick.weave import Evaluated, GuidedImages

__all__ = ["Outcome", "Stage", "run_stage"]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Result of a stage for the images of one lane.

    Attributes:
        batch: the images and their rows of the forward pass.
        sound: whether each image's prediction is finite.
        settled: whether each image's guidance ends here.
        recalls: whether each image recalls its next stage, if it may.
        denoised: guided predictions, ``[images, C, h, w]``.
    """

    batch: Batch
    sound: list[bool]
    settled: list[bool]
    recalls: list[bool]
    denoised: Tensor

    def broken(self, image: int) -> RowFailed:
        """The error that the client of an image with a non-finite prediction gets."""
        sequence = self.batch.sequences[image]
        plan = sequence.task.plan
        return RowFailed(
            f"The image became NaN or infinite at step {plan.step[sequence.stage] + 1} of "
            f"{plan.steps}; a lower guidance scale or another sampler may help."
        )


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A stage that has run.

    Attributes:
        outcomes: outcome of each lane.
        denoise_s: seconds of the forward pass.
        seconds: seconds of the whole stage.
    """

    outcomes: list[Outcome]
    denoise_s: float
    seconds: float

    @property
    def batches(self) -> list[Batch]:
        """The images of each lane."""
        return [outcome.batch for outcome in self.outcomes]


def run_stage(chosen: list[Sequence], meanwhile: Callable[[], None] = lambda: None) -> Stage:
    """Evaluate, guide and advance; write nothing unless all of it succeeds.

    Args:
        chosen: images of lanes that share a forward pass, those of a group side by side; either all
            of them recall the stage, or none.
        meanwhile: function that is called while the device works, before the host waits for it.
    """
    began = perf_counter()
    batches = [weave.pack(lane, own) for lane, own in _by_lane(chosen).items()]
    watch = Stopwatch(batches[0].lane.model.device)
    if chosen[0].recalls:
        with watch:
            evaluated = [recall.recall(batch) for batch in batches]
    else:
        # A GPU is idle while the rows are assembled, which must not count as time of the network.
        evaluated = weave.evaluate(batches, watch)
    steps = [_step(*both) for both in zip(batches, evaluated, strict=True)]
    meanwhile()
    values = _read_to_host(steps)
    resamplings = [
        resample(step.batch, step.evaluated.denoised, own.sound)
        for step, own in zip(steps, values, strict=True)
    ]
    outcomes = [_written(*each) for each in zip(steps, values, resamplings, strict=True)]
    return Stage(outcomes, watch.seconds(), perf_counter() - began)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A step of the images of one lane that is not written back yet."""

    batch: Batch
    evaluated: Evaluated
    guidance: GuidedImages
    state: Tensor
    foresight: CacheDecision


class _HostValues(NamedTuple):
    """Values about the images of one lane that the host reads from the device."""

    sound: list[bool]
    settled: list[bool]
    recalls: list[bool]


def _by_lane(chosen: list[Sequence]) -> dict[Lane, list[Sequence]]:
    lanes: dict[Lane, list[Sequence]] = {}
    for sequence in chosen:
        lanes.setdefault(sequence.lane, []).append(sequence)
    return lanes


def _step(batch: Batch, evaluated: Evaluated) -> _Step:
    guidance = weave.guide(batch, evaluated.denoised)
    state = weave.step(batch, guidance)
    return _Step(batch, evaluated, guidance, state, recall.decide_caches(batch, evaluated, state))


def _read_to_host(steps: list[_Step]) -> list[_HostValues]:
    parts = [
        part
        for step in steps
        for part in (
            step.guidance.denoised.flatten(1).sum(1),
            step.guidance.settled,
            step.foresight.recalls,
        )
    ]
    # The tick's only wait for the device.
    numbers = iter(torch.cat([part for part in parts if part is not None]).tolist())
    values: list[_HostValues] = []
    for step in steps:
        count = len(step.batch.sequences)
        sums = islice(numbers, count)
        sound = [isfinite(one) for one in sums]
        settled, recalls = (
            [False] * count if part is None else [one > 0 for one in islice(numbers, count)]
            for part in (step.guidance.settled, step.foresight.recalls)
        )
        values.append(_HostValues(sound, settled, recalls))
    return values


def _written(step: _Step, values: _HostValues, resampling: Resampling | None) -> Outcome:
    """Write the new states to the pool, after any resampling, and return the outcome."""
    batch, state, denoised, sound = step.batch, step.state, step.guidance.denoised, values.sound
    if resampling is not None:
        state, denoised = resampling.taken_over(state), resampling.taken_over(denoised)
        sound = [sound[origin] for origin in resampling.origins]
    weave.write_back(batch, state, step.guidance)
    recall.keep(batch, step.foresight)
    if resampling is not None:
        resampling.note(batch.sequences)
    return Outcome(batch, sound, values.settled, values.recalls, denoised)

"""One stage of the images of a tick: evaluate, guide, advance, and only then write."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from server.engine.tick import recall, weave
from server.engine.tick.resampling import resample
from server.engine.tick.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.state.batch import Batch
    from server.engine.state.sequence import Sequence

__all__ = ["Outcome", "run_stage"]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a stage leaves of its images.

    Attributes:
        batch: the images and the rows of their forward.
        sound: whether each image's prediction is finite.
        settled: whether each image's guidance ends here.
        recalls: whether each image is to recall its next stage, if it may.
        denoised: the guided predictions ``[images, C, h, w]``.
        denoise_s: seconds of the forward.
        seconds: of the whole stage.
    """

    batch: Batch
    sound: list[bool]
    settled: list[bool]
    recalls: list[bool]
    denoised: Tensor
    denoise_s: float
    seconds: float


def run_stage(chosen: list[Sequence], fixed_rows: int | None) -> Outcome:
    """Evaluate, guide and advance; nothing is written unless all of it succeeds.

    Args:
        chosen: images of one lane, those of a group side by side; all recall the stage, or none.
        fixed_rows: where set, the rows that every operation runs at.
    """
    began = perf_counter()
    lane = chosen[0].lane
    batch = weave.pack(lane, chosen, fixed_rows)
    watch = Stopwatch(lane.model.device)
    with watch:
        stage = recall.recall(batch) if batch.recalls else weave.evaluate(batch)
    predictions = stage.denoised
    guidance = weave.guide(batch, predictions)
    state = weave.step(batch, guidance)
    finite = guidance.denoised.flatten(1).sum(1).isfinite()
    foresight = recall.foresee(batch, stage, state)
    # The tick's one wait for the device.
    sound, settled, recalls = torch.stack([finite, guidance.settled, foresight.recalls]).tolist()
    denoised = guidance.denoised
    resampling = resample(batch, predictions, sound)
    if resampling is not None:
        state, denoised = resampling.taken_over(state), resampling.taken_over(denoised)
        sound = [sound[origin] for origin in resampling.origins]
    weave.write_back(batch, state, guidance)
    recall.keep(batch, stage, foresight)
    if resampling is not None:
        resampling.note(chosen)
    seconds = watch.seconds(), perf_counter() - began
    return Outcome(batch, sound, settled, recalls, denoised, *seconds)

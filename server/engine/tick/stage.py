"""One stage of the images of a tick: evaluate, guide, advance, and only then write."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from server.engine.tick import weave
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
        denoised: the guided predictions ``[images, C, h, w]``.
        denoise_s: seconds of the forward.
        seconds: of the whole stage.
    """

    batch: Batch
    sound: list[bool]
    settled: list[bool]
    denoised: Tensor
    denoise_s: float
    seconds: float


def run_stage(chosen: list[Sequence], fixed_rows: int | None) -> Outcome:
    """Evaluate, guide and advance; nothing is written unless all of it succeeds.

    Args:
        chosen: images of one lane, those of a group side by side.
        fixed_rows: where set, the rows that every operation runs at.
    """
    began = perf_counter()
    lane = chosen[0].lane
    batch = weave.pack(lane, chosen, fixed_rows)
    watch = Stopwatch(lane.model.device)
    with watch:
        predictions = weave.evaluate(batch)
    guidance = weave.guide(batch, predictions)
    state = weave.step(batch, guidance)
    finite = guidance.denoised.flatten(1).sum(1).isfinite()
    # The tick's one wait for the device.
    sound, settled = torch.stack([finite, guidance.settled]).tolist()
    denoised = guidance.denoised
    resampling = resample(batch, predictions, sound)
    if resampling is not None:
        state, denoised = resampling.taken_over(state), resampling.taken_over(denoised)
        sound = [sound[origin] for origin in resampling.origins]
    weave.write_back(batch, state, guidance)
    if resampling is not None:
        resampling.note(chosen)
    return Outcome(batch, sound, settled, denoised, watch.seconds(), perf_counter() - began)

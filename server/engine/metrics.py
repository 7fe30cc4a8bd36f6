"""Plain counters of the engine, written by its thread and read by any."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from time import monotonic
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from server.engine.scheduler import Priority
from server.latencies import Latencies

if TYPE_CHECKING:
    from server.engine.state.sequence import ImageResult, Sequence

Stage: TypeAlias = Literal["queue", "denoise", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Phases of an image in order: waiting, denoising, and decoding."""

LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Upper bounds of the histogram in seconds; those below 1 are meant for live frames."""


@dataclass(slots=True)
class EngineMeasurements:
    """Counts and times of the engine since it started; all times are in seconds.

    Attributes:
        ticks: number of forward passes of the denoiser.
        rows_per_tick: number of ticks by their number of rows, without padding.
        denoise_s: time inside the denoiser.
        weave_s: time of ticks outside the denoiser and the autoencoder.
        decode_s: time in the autoencoder's decoder.
        encode_s: time in the text encoder and the autoencoder's encoder.
        images: number of finished images.
        latencies: latencies of finished images, by priority.
        stages: parts of these latencies, by priority and phase.
        failed: number of images that ended without a picture, cancelled ones excluded.
        cancelled: number of images cancelled by the client.
        refused: number of images refused because the queue was full; frames of streams wait
            instead.
        evaluations: number of rows evaluated.
        saved: number of evaluations saved, by the name of the policy or the step cache.
        pending: number of images waiting or under way.
        live_pending: number of these that are frames of live streams.
        row_budget: maximum number of rows in a tick.
        fixed_rows: number of rows of every forward pass in deterministic mode, except where images
            need more at once; set before the first image comes.
    """

    ticks: int = 0
    rows_per_tick: Counter[int] = field(default_factory=Counter)
    denoise_s: float = 0.0
    weave_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    images: int = 0
    latencies: dict[Priority, Latencies] = field(
        default_factory=lambda: {priority: Latencies(LATENCY_BUCKETS) for priority in Priority}
    )
    stages: dict[tuple[Priority, Stage], Latencies] = field(
        default_factory=lambda: {
            key: Latencies(LATENCY_BUCKETS) for key in product(Priority, STAGES)
        }
    )
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    evaluations: int = 0
    saved: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    live_pending: int = 0
    row_budget: int = 0
    fixed_rows: int | None = None

    def finished(self, sequence: Sequence, result: ImageResult) -> None:
        """Count an image that is finished, and what its policy and its step cache saved."""
        task = sequence.task
        self.images += 1
        self.latencies[task.priority].add(monotonic() - sequence.submitted_at)
        stages: dict[Stage, float] = {
            "queue": result.queue_s,
            "denoise": result.denoise_s,
            "decode": result.decode_s,
        }
        for stage, spent in stages.items():
            self.stages[task.priority, stage].add(spent)
        if sequence.saved:
            self.saved[task.policy.name] += sequence.saved
        if task.cache is not None:
            self.saved[task.cache.name] += sequence.recollection.saved

    def pending_of(self, *, live: bool) -> int:
        """Number of images waiting or under way, either of live streams or ordinary ones."""
        return self.live_pending if live else self.pending - self.live_pending

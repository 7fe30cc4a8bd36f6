"""Plain counters of the engine, written by its thread and read by anyone."""

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
"""What follows what on an image's way: waiting, its evaluations, and becoming a picture."""

LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Upper bounds in seconds, of which those below 1 are meant for live frames."""


@dataclass(slots=True)
class EngineMeasurements:
    """What the engine has done since it started; all times in seconds.

    Attributes:
        ticks: forwards of the denoiser.
        rows_per_tick: how many ticks had how many rows, padding not counted.
        denoise_s: inside the denoiser.
        weave_s: in ticks, outside the denoiser and the autoencoder.
        decode_s: in the autoencoder's decoder.
        encode_s: in text encoder and the autoencoder's encoder.
        images: finished.
        latencies: of finished images, by priority.
        stages: what of that they spent where, by priority and stage.
        failed: ended without a picture, cancelled ones apart.
        cancelled: ended by the client.
        refused: turned away because the queue was full; frames of streams wait instead.
        evaluations: rows evaluated.
        saved: evaluations saved, by the name of the policy or the step cache.
        pending: images waiting or under way.
        live_pending: of these, frames of live streams.
        row_budget: most rows of a tick.
        fixed_rows: of every forward in deterministic mode, but of those whose images need more at
            once; set before the first image comes.
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
        """Count an image that has its pixels, and what its policy and its step cache saved."""
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
        """Images waiting or under way, of live streams or of others."""
        return self.live_pending if live else self.pending - self.live_pending

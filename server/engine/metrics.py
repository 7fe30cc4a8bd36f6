"""Plain counters of the engine, written by its thread and read by anyone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
        failed: ended without a picture, cancelled ones apart.
        cancelled: ended by the client.
        refused: turned away because the queue was full.
        evaluations: rows evaluated.
        saved: evaluations saved, by policy.
        pending: images waiting or under way.
        row_budget: rows of a tick.
    """

    ticks: int = 0
    rows_per_tick: Counter[int] = field(default_factory=Counter)
    denoise_s: float = 0.0
    weave_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    images: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    evaluations: int = 0
    saved: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    row_budget: int = 0

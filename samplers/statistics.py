"""Empirical model statistics, which DPM-Solver-v3 needs of a model, and their file format.

With ``y = x / alpha``, ``lam = log(alpha / sigma)`` and the noise prediction ``eps`` of the guided
model, ``l`` is chosen so that ``f = (sigma eps - l x) / alpha`` depends on x as little as possible.
``s`` and ``b`` are those of the line ``f' = s f + b`` that best fits the change of f along the
flow. Each is a function of lam for every element of a latent (Zheng et al., arXiv 2310.13268,
section 3).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from samplers.whole_file import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from samplers.levels import F64, Levels

FORMAT = "weft.statistics.1"
TIMES = 33
"""Number of times at which schedules are compared."""
CHANNEL_AXES = (2, 3)


def schedule_fingerprint(schedule: Levels) -> str:
    """The class name of a schedule and 16 hexadecimal digits derived from its levels."""
    times = np.linspace(schedule.t_end, schedule.t_start, TIMES)
    # Rounded, as the last digits of exp and log differ between machines.
    digest = hashlib.sha256(np.round(schedule.half_log_snr(times), 6).astype("<f8").tobytes())
    return f"{type(schedule).__name__}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class StatisticsIdentity:
    """What statistics were computed for; they are not valid for anything else.

    Attributes:
        model: revision of the model, or any name for a callable of your own.
        schedule: ``schedule_fingerprint`` of its noise schedule.
        t_start: the noisiest time, in the schedule's own time.
        t_end: the cleanest time.
        rule: name of the guidance rule; ``none`` for the prompt alone.
        scale: guidance scale, 1 for ``none``.
        shape: shape of the latents, ``(C, h, w)``.
        samples: K, number of noised samples at each point.
        points: number of points in lam.
    """

    model: str
    schedule: str
    t_start: float
    t_end: float
    rule: str
    scale: float
    shape: tuple[int, ...]
    samples: int
    points: int

    def check(self, model: str, schedule: str) -> None:
        """Refuse statistics of another model or schedule.

        Args:
            model: revision of the weights that will be sampled.
            schedule: schedule_fingerprint of their schedule.

        Raises:
            ValueError: the model or the schedule differs; the message is a sentence for the user.
        """
        for what, own, asked in (
            ("model revision", self.model, model),
            ("noise schedule", self.schedule, schedule),
        ):
            if own != asked:
                raise ValueError(
                    f"statistics are for {what} {own}, but the model's is {asked}; they must be "
                    "computed again."
                )


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """l, s and b as functions of lam.

    Attributes:
        half_log_snr: lam of the points, strictly increasing, ``[points]``.
        l: ``[points, C, h, w]`` elementwise, ``[points, C, 1, 1]`` per channel, or ``[points]``.
        s: of the same shape as ``l``.
        b: of the same shape as ``l``.
        identity: what they were computed for; None for closed forms.

    Raises:
        ValueError: the arrays differ in shape, there are no points, points do not increase, or
            values are not finite.
    """

    half_log_snr: F64
    l: F64  # noqa: E741 - the paper's name
    s: F64
    b: F64
    identity: StatisticsIdentity | None = None

    def __post_init__(self) -> None:
        shapes = [array.shape for array in (self.l, self.s, self.b)]
        if shapes != [shapes[0]] * 3 or shapes[0][:1] != self.half_log_snr.shape:
            raise ValueError(
                f"l, s and b have the shapes {', '.join(map(str, shapes))}; all must be the same, "
                f"with one entry for each of the {self.half_log_snr.size} points of half_log_snr."
            )
        if not self.half_log_snr.size:
            raise ValueError("half_log_snr is empty; it must have at least one point.")
        for name in ("half_log_snr", "l", "s", "b"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} has values that are not finite.")
        if np.any(np.diff(self.half_log_snr) <= 0):
            raise ValueError("half_log_snr must rise from each point to the next.")

    def per_channel(self) -> Statistics:
        """Means over the elements of each channel, usable for latents of any size."""
        if self.l.ndim == 1:
            return self
        l, s, b = (a.mean(CHANNEL_AXES, keepdims=True) for a in (self.l, self.s, self.b))  # noqa: E741
        return replace(self, l=l, s=s, b=b)

    def for_shape(self, shape: tuple[int, ...]) -> Statistics:
        """Statistics for a latent ``(C, h, w)``: elementwise if of its shape, else per channel.

        Raises:
            ValueError: the latent has another number of channels.
        """
        own = self.l.shape[1:]
        if not own or own == shape:
            return self
        if own[0] not in (1, shape[0]):
            raise ValueError(
                f"statistics are for {own[0]} latent channels, but the latent has {shape[0]}."
            )
        return self.per_channel()

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically.

        The arrays are stored in float32; lam stays float64.
        """
        arrays = {name: getattr(self, name).astype(np.float32) for name in ("l", "s", "b")}
        metadata = {"format": FORMAT}
        if self.identity is not None:
            metadata["identity"] = json.dumps(asdict(self.identity))
        write_whole(path, save({"half_log_snr": self.half_log_snr, **arrays}, metadata))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a file that ``save`` wrote, as float64.

        Raises:
            ValueError: the file holds no statistics, or invalid ones.
        """
        identity = read_identity(path)
        with safe_open(path, "np") as content:
            try:
                lam, l, s, b = (  # noqa: E741
                    content.get_tensor(name).astype(np.float64)
                    for name in ("half_log_snr", "l", "s", "b")
                )
            # TypeError and AttributeError are raised for dtypes that numpy does not have.
            except (SafetensorError, TypeError, AttributeError) as error:
                raise ValueError(f"statistics file {str(path)!r} is incomplete: {error}.") from None
        try:
            return cls(lam, l, s, b, identity)
        except ValueError as refusal:
            raise ValueError(f"statistics file {str(path)!r} is unusable: {refusal}") from None


def read_identity(path: Path) -> StatisticsIdentity | None:
    """What the statistics in a file were computed for, read from its header; None for closed forms.

    Raises:
        ValueError: the file holds no statistics.
    """
    try:
        with safe_open(path, "np") as content:
            metadata: dict[str, str] = content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"statistics file {str(path)!r} cannot be read: {error}.") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} contains no statistics in the format {FORMAT}.")
    if "identity" not in metadata:
        return None
    try:
        return TypeAdapter(StatisticsIdentity).validate_json(metadata["identity"])
    except ValidationError:
        raise ValueError(f"{str(path)!r} does not say what its statistics belong to.") from None

"""Noise schedules of flow-matching models, by image size and number of steps.

They equal those of diffusers' ``FlowMatchEulerDiscreteScheduler`` where its pipelines pass sigmas
from 1 to 1 / N, which is the spacing ``trailing`` of the schedules here.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp
from typing import TYPE_CHECKING, Any, Final

from samplers import NoiseSchedule
from samplers.noise_schedule import TRAINED_STEPS
from server.errors import ModelMismatch
from server.models.folder import component_class, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["SCHEDULER", "FlowSchedules", "empirical_mu", "interpolated_mu", "mu_of_scheduler"]

SCHEDULER: Final = "scheduler/scheduler_config.json"
SCHEDULER_CLASS: Final = "FlowMatchEulerDiscreteScheduler"

REFUSED: Final = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
"""Config entries that no published model sets; samplers and spacings are chosen by requests."""

NUMBERS: Final[Mapping[str, tuple[float, float]]] = {
    "shift": (0.01, 100),
    "base_shift": (-10, 10),
    "max_shift": (-10, 10),
    "base_image_seq_len": (1, 1_000_000),
    "max_image_seq_len": (1, 1_000_000),
    "shift_terminal": (0, 0.99),
    "num_train_timesteps": (TRAINED_STEPS, TRAINED_STEPS),
}
"""Config entries with their allowed minimum and maximum."""

MAX_MU: Final = 30
"""Maximum mu of exponential shifts; FLUX.1 dev reaches it at 6700 x 6700 pixels. Beyond it, float64
cannot resolve the difference from pure noise."""

MAX_CACHED_SCHEDULES: Final = 512
MAX_INTERPOLATED_TOKENS: Final = 4300
"""Number of image tokens above which FLUX.2's mu no longer depends on the steps."""


class FlowSchedules:
    """Returns the schedule for a size and a number of steps; equal schedules are the same object.

    Args:
        folder: model folder.
        cell: pixels along one side of a token of the denoiser.
        mu: logarithm of the shift as a function of the image's tokens and the run's steps, for
            schedulers whose shift depends on the size; None for the line given by the config.

    Raises:
        ModelMismatch: the scheduler is of another class, or has unsupported settings.
        ValueError: a shift that no schedule allows.
    """

    def __init__(
        self, folder: Path, cell: int, mu: Callable[[int, int], float] | None = None
    ) -> None:
        component_class(folder, "scheduler", frozenset({SCHEDULER_CLASS}))
        config = read_json(folder, SCHEDULER)
        for entry in REFUSED:
            if config.get(entry):
                raise ModelMismatch(
                    f"{SCHEDULER} of model folder {str(folder)!r} has {entry} "
                    f"{str(config[entry])[:40]!r}; only false is supported, and each request "
                    "names its sampler and spacing."
                )
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ModelMismatch(
                f"{SCHEDULER} of model folder {str(folder)!r} has the time_shift_type "
                f"{str(kind)[:40]!r}; allowed are exponential and linear."
            )
        _check_numbers(folder, config)
        self._cell = cell
        self._exponential = kind == "exponential"
        self._terminal: float | None = config.get("shift_terminal") or None
        self._shift = float(config.get("shift", 1.0))
        self._mu = (mu or mu_of_scheduler(config)) if config.get("use_dynamic_shifting") else None
        self._made = lru_cache(MAX_CACHED_SCHEDULES)(_schedule)
        # One token has the smallest shift; if it is invalid, loading the model fails.
        self(cell, cell, 2)

    def __call__(self, width: int, height: int, steps: int) -> NoiseSchedule:
        """The schedule of a run.

        Args:
            width: image width in pixels.
            height: image height in pixels.
            steps: number of steps of the run.
        """
        shift = self._shift
        if self._mu is not None:
            mu = self._mu((width // self._cell) * (height // self._cell), steps)
            shift = exp(min(mu, MAX_MU)) if self._exponential else mu
        return self._made(shift, self._terminal, None if self._terminal is None else steps)


def mu_of_scheduler(config: Mapping[str, Any]) -> Callable[[int, int], float]:
    """Mu on the line between the two lengths of a scheduler's config, for any number of steps."""
    lengths, shifts = _ends_of_mu(config)
    return lambda tokens, _: interpolated_mu(tokens, lengths, shifts)


def interpolated_mu(
    tokens: int, lengths: tuple[float, float], shifts: tuple[float, float]
) -> float:
    """Mu on a line through two points, extrapolated beyond them (FLUX.1's ``calculate_shift``).

    Args:
        tokens: number of tokens of the image.
        lengths: numbers of tokens at the two points.
        shifts: mu at the two points.
    """
    slope = (shifts[1] - shifts[0]) / (lengths[1] - lengths[0])
    return shifts[0] + slope * (tokens - lengths[0])


def empirical_mu(tokens: int, steps: int) -> float:
    """Mu of FLUX.2 for an image's tokens and a run's steps (its ``compute_empirical_mu``).

    It lies on a line through two fits, at 10 and at 200 steps.
    """
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > MAX_INTERPOLATED_TOKENS:
        return at_200
    return at_200 + (steps - 200) * (at_200 - at_10) / 190


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    where = f"{SCHEDULER} of model folder {str(folder)!r}"
    for entry, (least, most) in NUMBERS.items():
        value: Any = config.get(entry, least)
        if value is None and entry == "shift_terminal":
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value <= most
        ):
            allowed = f"a number from {least:g} to {most:g}" if least < most else f"only {most:g}"
            raise ModelMismatch(
                f"{where} has the {entry} {str(value)[:40]!r}; {allowed} is allowed."
            )
    lengths, shifts = _ends_of_mu(config)
    if lengths[0] >= lengths[1] or shifts[0] > shifts[1]:
        raise ModelMismatch(
            f"{where} goes from base_shift {shifts[0]:g} at {lengths[0]:g} tokens to max_shift "
            f"{shifts[1]:g} at {lengths[1]:g}; base_image_seq_len must be below "
            "max_image_seq_len, and base_shift at most max_shift."
        )


def _ends_of_mu(config: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two lengths of a scheduler's config, and mu at these lengths."""
    return (
        (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
        (config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
    )


def _schedule(shift: float, terminal: float | None, steps: int | None) -> NoiseSchedule:
    return NoiseSchedule.flow(shift, terminal=terminal, steps=steps)

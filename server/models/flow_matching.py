"""The noise schedules of flow-matching models, by size and number of steps.

As the ``FlowMatchEulerDiscreteScheduler`` of diffusers sets them, where its pipelines give it the
sigmas 1 to 1 / N: that is the spacing ``trailing`` of the schedules here.
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
"""Entries of its config that no published model sets; samplers and spacings are for requests."""

NUMBERS: Final[Mapping[str, tuple[float, float]]] = {
    "shift": (0.01, 100),
    "base_shift": (-10, 10),
    "max_shift": (-10, 10),
    "base_image_seq_len": (1, 1_000_000),
    "max_image_seq_len": (1, 1_000_000),
    "shift_terminal": (0, 0.99),
    "num_train_timesteps": (TRAINED_STEPS, TRAINED_STEPS),
}
"""Entries of its config with the least and the most that is allowed."""

LARGEST_MU: Final = 30
"""Of exponential shifts; FLUX.1 dev reaches it at 6700 x 6700 pixels. Beyond, float64 has no digits
left for what differs from pure noise."""

SCHEDULES_KEPT: Final = 512
LONGEST_INTERPOLATED: Final = 4300
"""Tokens of a picture beyond which FLUX.2's mu no longer depends on the steps."""


class FlowSchedules:
    """The schedule of each size and number of steps; equal ones are the same object.

    Args:
        folder: of the model.
        cell: pixels along a side of what the denoiser takes as one token.
        mu: of a picture's tokens and a run's steps, the logarithm of the shift, for schedulers
            whose shift follows the size; None for the line that the config names.

    Raises:
        ModelMismatch: the scheduler is of another class, or set to what is not supported.
        ValueError: a shift that no schedule has.
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
        self._made = lru_cache(SCHEDULES_KEPT)(_schedule)
        # One token has the smallest shift; what is wrong with it is said while the model is loaded.
        self(cell, cell, 2)

    def __call__(self, width: int, height: int, steps: int) -> NoiseSchedule:
        """The schedule of a run.

        Args:
            width: of the picture in pixels.
            height: of the picture in pixels.
            steps: of the run.
        """
        shift = self._shift
        if self._mu is not None:
            mu = self._mu((width // self._cell) * (height // self._cell), steps)
            shift = exp(min(mu, LARGEST_MU)) if self._exponential else mu
        return self._made(shift, self._terminal, None if self._terminal is None else steps)


def mu_of_scheduler(config: Mapping[str, Any]) -> Callable[[int, int], float]:
    """Mu on the line between the two lengths of a scheduler's config, whatever the steps."""
    lengths, shifts = _ends_of_mu(config)
    return lambda tokens, _: interpolated_mu(tokens, lengths, shifts)


def interpolated_mu(
    tokens: int, lengths: tuple[float, float], shifts: tuple[float, float]
) -> float:
    """Mu on a line through two points, beyond them too (FLUX.1's ``calculate_shift``).

    Args:
        tokens: of the picture.
        lengths: numbers of tokens at the two points.
        shifts: mu there.
    """
    slope = (shifts[1] - shifts[0]) / (lengths[1] - lengths[0])
    return shifts[0] + slope * (tokens - lengths[0])


def empirical_mu(tokens: int, steps: int) -> float:
    """Mu of FLUX.2, by the picture's tokens and the run's steps (its ``compute_empirical_mu``).

    On a line through two fits, at 10 and at 200 steps.
    """
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > LONGEST_INTERPOLATED:
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
    """The two lengths of a scheduler's config, and mu there."""
    return (
        (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
        (config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
    )


def _schedule(shift: float, terminal: float | None, steps: int | None) -> NoiseSchedule:
    return NoiseSchedule.flow(shift, terminal=terminal, steps=steps)

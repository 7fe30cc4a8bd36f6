"""The points of a run: the levels where a plan evaluates and where it lands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from samplers.arguments import number, whole_number
from samplers.plan_error import PlanError

if TYPE_CHECKING:
    from samplers.levels import F64, Levels
    from samplers.spacing import Spacing

PURE_NOISE = -7.0
"""Half-log-SNR used in place of -inf at pure noise, in the weights of higher-order terms only.

From -5 to -30 the value makes no difference to UniPC with bh2; bh1 overshoots more the lower it is
(measured on a mixture).
"""

ROUNDING = 1e-6
"""Relative amount by which a time may exceed the noisiest one, as times in float32 may."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """N steps between N + 1 points of decreasing noise.

    Attributes:
        schedule: the schedule that the points lie on.
        t: times that the denoiser is given, ``[N + 1]``. They may be rounded to trained timesteps
            while the levels are not.
        alpha: signal scale at the points, ``[N + 1]``.
        sigma: noise scale at the points, ``[N + 1]``; the last is 0 unless an end was requested.
    """

    schedule: Levels
    t: F64
    alpha: F64
    sigma: F64

    @classmethod
    def of(
        cls,
        schedule: Levels,
        spacing: Spacing,
        steps: int,
        t_start: float | None,
        t_end: float | None,
    ) -> Grid:
        """See :meth:`samplers.noise_schedule.NoiseSchedule.grid`."""
        steps = whole_number("steps", steps, least=1)
        if t_start is None and t_end is None:
            times = _of_steps(spacing, spacing.evaluated(schedule, steps), steps)
            return cls.on_times(schedule, times, spacing, clean=True)
        first = schedule.t_start if t_start is None else number("t_start", t_start)
        last = schedule.t_end if t_end is None else number("t_end", t_end)
        _, sigma_last = schedule.level(np.array(last))
        if not schedule.t_start >= first > last >= 0 or sigma_last == 0:
            raise ValueError(
                f"t_start is {first:g} and t_end is {last:g}; a run must go from at most "
                f"{schedule.t_start:g} down to a lower time, at which noise is left."
            )
        count = steps if t_end is None else steps + 1
        times = _of_steps(spacing, spacing.fill(schedule, count, first, last), count)
        return cls.on_times(schedule, times, spacing, clean=t_end is None)

    @classmethod
    def on_times(
        cls, schedule: Levels, t: F64, spacing: Spacing | None = None, *, clean: bool
    ) -> Grid:
        """A grid on given times, with the clean picture as one more point if ``clean``.

        Args:
            schedule: schedule that the points lie on.
            t: strictly decreasing times, ``[N]`` with ``clean`` and ``[N + 1]`` without; at most
                the schedule's ``t_start`` and at least 0.
            spacing: spacing that chose the times, if any; it decides whether the denoiser is given
                whole timesteps instead.
            clean: whether to end on the clean picture, which is then not a point of ``t``.

        Raises:
            ValueError: there are too few times; they do not decrease strictly or lie outside the
                schedule; the last one has no noise although the clean picture follows; or the
                spacing needs whole timesteps and the schedule has none.
        """
        t = _within(schedule, np.asarray(t, np.float64), least=1 if clean else 2)
        risen = np.flatnonzero(np.diff(t) >= 0)
        if len(risen):
            first = int(risen[0])
            raise PlanError(
                "steps",
                f"timesteps go from {t[first]:g} to {t[first + 1]:g}; "
                "each must be below the one before it"
                + ("; ask for fewer steps." if spacing is not None else "."),
            )
        alpha, sigma = schedule.level(t)
        if clean and sigma[-1] == 0:
            raise ValueError(
                f"t ends at {t[-1]:g}, where no noise is left; leave that time out, as clean=True "
                "adds the clean picture."
            )
        told = t
        if spacing is not None and spacing.integer_timesteps:
            if not schedule.whole_timesteps:
                raise PlanError(
                    "spacing.whole",
                    "spacing.whole is true, which needs a model with whole trained timesteps; "
                    "leave it false for this one.",
                )
            told = np.round(t)
        if clean:
            told, alpha, sigma = np.append(told, 0.0), np.append(alpha, 1.0), np.append(sigma, 0.0)
        return cls(schedule, told, alpha, sigma)

    def landed(self) -> Grid:
        """The grid that DDIM and PLMS follow, which may land on the cleanest trained level.

        It does so where diffusers' config has ``set_alpha_to_one: false``.
        """
        if self.schedule.clean_end or self.sigma[-1] > 0:
            return self
        alpha, sigma = self.schedule.level(np.array([self.schedule.t_end]))
        return Grid(
            self.schedule,
            self.t,
            np.append(self.alpha[:-1], alpha),
            np.append(self.sigma[:-1], sigma),
        )

    @property
    def steps(self) -> int:
        """N."""
        return len(self.t) - 1

    @property
    def half_log_snr(self) -> F64:
        """``log(alpha / sigma)`` at the points: -inf at pure noise, inf at the clean end."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def finite_half_log_snr(self) -> F64:
        """``half_log_snr`` with a finite value at pure noise, for weights that need step lengths.

        That value is at least 1 below the second point, however low that lies.
        """
        lam = self.half_log_snr
        return np.append(lam[0] if np.isfinite(lam[0]) else min(PURE_NOISE, lam[1] - 1), lam[1:])

    @property
    def start_scale(self) -> float:
        """Standard deviation of the noise from which a run without a start picture begins."""
        return 1.0 if self.schedule.unit_start else float(self.sigma[0])

    def tail(self, strength: float) -> Grid:
        """The last ``strength`` fraction of the steps, for a start from a noised picture.

        Args:
            strength: fraction of the steps, in (0, 1]; ``strength * N`` steps are kept, rounded as
                the schedule's ``tail_rounds_up`` says.

        Raises:
            ValueError: the strength is outside that range, or so low that no step is left.
        """
        if not 0 < strength <= 1:
            raise PlanError(
                "strength", f"strength is {strength:g}; it must be above 0 and at most 1."
            )
        # As in diffusers' pipelines, including their rounding of the product.
        share = self.steps * strength
        up = self.schedule.tail_rounds_up
        kept = self.steps - int(self.steps - share) if up else int(share)
        if kept < 1:
            raise PlanError(
                "strength",
                f"strength is {strength:g}, which leaves none of {self.steps} steps; "
                f"at least {1 / self.steps:.3g} is needed.",
            )
        return self.part(self.steps - kept, self.steps)

    def part(self, first: int, last: int) -> Grid:
        """The steps between two points, by their indices."""
        points = slice(first, last + 1)
        return Grid(self.schedule, self.t[points], self.alpha[points], self.sigma[points])


def _of_steps(spacing: Spacing, times: F64, count: int) -> F64:
    """Check that a spacing gave as many times as requested, and return them.

    Raises:
        ValueError: it gave another number.
    """
    if np.shape(times) != (count,):
        raise ValueError(
            f"spacing {spacing.name!r} gave times of shape {np.shape(times)}; it must give {count}."
        )
    return times


def _within(schedule: Levels, t: F64, least: int) -> F64:
    """The times, of which those that exceed the noisiest one by rounding are set to it.

    Raises:
        ValueError: there are fewer than ``least``, or some are not finite or outside the schedule.
    """
    if t.ndim != 1 or len(t) < least:
        raise ValueError(f"t has shape {t.shape}; it must be a list of at least {least} times.")
    noisiest = schedule.t_start
    outside = np.flatnonzero(~((t >= 0) & (t <= noisiest * (1 + ROUNDING))))
    if len(outside):
        raise ValueError(
            f"t holds {t[outside[0]]:g}; this schedule has times from {noisiest:g} down to 0."
        )
    return np.minimum(t, noisiest)

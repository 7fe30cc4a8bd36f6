"""Spacings: how the steps of a run are laid out over the noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field
from typing_extensions import override

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Spacing(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """One way to choose the times of a run.

    ``evaluated`` gives the times of the N evaluations of a run that ends on the clean picture;
    ``times`` fills a given range, both ends included.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    name: str

    @property
    def integer_timesteps(self) -> bool:
        """Whether the denoiser is told whole timesteps, whatever the levels are."""
        return False

    def times(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        """``count`` falling times from ``t_start`` to ``t_end``."""
        return schedule.uniform(count, t_start, t_end)

    def evaluated(self, schedule: Levels, steps: int) -> F64:
        """The ``steps`` falling times at which a run to the clean picture evaluates."""
        return self.times(schedule, steps, schedule.t_start, schedule.t_end)


class Leading(Spacing, frozen=True):
    """Whole strides counted up from the clean end."""

    summary: ClassVar[str] = "Equal strides that start just above the clean end."
    source: ClassVar[str] = "DDIM (arXiv 2010.02502); Lin et al. (arXiv 2305.08891), table 2."
    name: Literal["leading"] = "leading"
    offset: int = Field(default=1, ge=0, le=10, description="Trained steps added to every time.")

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if trained := schedule.whole_timesteps:
            _refuse_more_than_trained(trained, steps)
            stride = trained // steps
            times = np.arange(steps)[::-1] * stride + self.offset
            return np.minimum(times, trained - 1).astype(np.float64)
        every = schedule.uniform(steps + 1, schedule.t_start, schedule.t_end)
        return every[1:]


class Trailing(Spacing, frozen=True):
    """Equal strides counted down from the noisiest level."""

    summary: ClassVar[str] = "Equal strides that start at the noisiest level; right for few steps."
    source: ClassVar[str] = "Lin et al. (arXiv 2305.08891), section 3.3."
    name: Literal["trailing"] = "trailing"

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if trained := schedule.whole_timesteps:
            _refuse_more_than_trained(trained, steps)
            return np.round(trained - np.arange(steps) * (trained / steps)) - 1
        return schedule.uniform(steps + 1, schedule.t_start, 0.0)[:-1]


class Linspace(Spacing, frozen=True):
    """Equal strides over the whole trained range."""

    summary: ClassVar[str] = "Equal strides from the noisiest to the cleanest trained level."
    source: ClassVar[str] = "k-diffusion and diffusers, the `linspace` spacing."
    name: Literal["linspace"] = "linspace"
    endpoint: bool = Field(
        default=True,
        description="Evaluate at the cleanest level too; without it, as the DPM-Solver authors do,"
        " the last evaluation stands one stride above.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        count = steps if self.endpoint else steps + 1
        times = self.times(schedule, count, schedule.t_start, schedule.t_end)[:steps]
        if trained := schedule.whole_timesteps:
            _refuse_more_than_trained(trained, steps)
            return np.round(times)
        return times


class Karras(Spacing, frozen=True):
    """Even in sigma^(1/rho): many steps at low noise."""

    summary: ClassVar[str] = "Even in sigma^(1/rho); spends many steps on fine detail."
    source: ClassVar[str] = "Karras et al. (arXiv 2206.00364), equation 5."
    name: Literal["karras"] = "karras"
    rho: float = Field(
        default=7.0, ge=1, le=100, description="Larger spends more steps at low noise."
    )
    whole: bool = Field(
        default=False, description="Tell the denoiser whole timesteps, as diffusers does."
    )

    @property
    @override
    def integer_timesteps(self) -> bool:
        return self.whole

    @override
    def times(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        ends = schedule.half_log_snr(np.array([_finite_start(schedule, t_start), t_end]))
        # sigma / alpha = exp(-half log SNR)
        first, last = np.exp(-ends / self.rho)
        ratio = np.linspace(first, last, count) ** self.rho
        return schedule.time_of_half_log_snr(-np.log(ratio))


class LogSNR(Spacing, frozen=True):
    """Even in log(alpha / sigma)."""

    summary: ClassVar[str] = "Even in log SNR; the natural measure of the exponential integrators."
    source: ClassVar[str] = "DPM-Solver (arXiv 2206.00927), section 3.4."
    name: Literal["logsnr"] = "logsnr"
    whole: bool = Field(
        default=False, description="Tell the denoiser whole timesteps, as diffusers does."
    )

    @property
    @override
    def integer_timesteps(self) -> bool:
        return self.whole

    @override
    def times(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        ends = schedule.half_log_snr(np.array([_finite_start(schedule, t_start), t_end]))
        return schedule.time_of_half_log_snr(np.linspace(ends[0], ends[1], count))


class LCMSpacing(Spacing, frozen=True):
    """The times that latent consistency models were distilled at."""

    summary: ClassVar[str] = "Picks from the 50 times that consistency models were distilled at."
    source: ClassVar[str] = "LCM (arXiv 2310.04378), algorithm 3."
    name: Literal["lcm"] = "lcm"
    distilled_steps: int = Field(
        default=50,
        ge=1,
        le=1000,
        description="Steps of the solver that the model was distilled from.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if not (trained := schedule.whole_timesteps):
            raise ValueError(
                "spacing is 'lcm', which needs a model with whole trained timesteps; "
                "use 'trailing' with this one."
            )
        _refuse_more_than_trained(trained, self.distilled_steps, "distilled_steps")
        if steps > self.distilled_steps:
            raise ValueError(
                f"steps is {steps}; the spacing 'lcm' has at most {self.distilled_steps}."
            )
        stride = trained // self.distilled_steps
        distilled = np.arange(self.distilled_steps, 0, -1) * stride - 1
        picked = np.floor(np.linspace(0, self.distilled_steps, steps, endpoint=False))
        return distilled[picked.astype(np.intp)].astype(np.float64)


def _finite_start(schedule: Levels, t_start: float) -> float:
    """Flow matching has no signal at all at t = 1: logarithmic spacings start just below."""
    if np.isfinite(schedule.half_log_snr(np.array(t_start))):
        return t_start
    return t_start * (1 - 1e-3)


def _refuse_more_than_trained(trained: int, steps: int, field: str = "steps") -> None:
    if steps > trained:
        raise ValueError(
            f"{field} is {steps}; the model has {trained} trained timesteps, which is the most."
        )

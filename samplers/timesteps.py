"""The common spacings: even in time, in log SNR, or in a power of sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan_error import PlanError
from samplers.spacing import (
    LevelSpacing,
    ListedSpacing,
    Spacing,
    finite_start,
    refuse_more_than_trained,
)

if TYPE_CHECKING:
    from samplers.levels import F64, Levels


class Leading(Spacing, frozen=True):
    """Equal whole strides counted up from the clean end."""

    summary: ClassVar[str] = "Equal strides that start just above the clean end."
    source: ClassVar[str] = "DDIM (arXiv 2010.02502); Lin et al. (arXiv 2305.08891), table 2."
    name: Literal["leading"] = "leading"
    offset: int = Field(
        default=1, ge=0, le=10, description="Number of trained timesteps added to every time."
    )
    endpoint: bool = Field(
        default=True,
        description="Evaluate at the cleanest stride too; without it, as in diffusers' multistep "
        "solvers, there is one more stride and the last evaluation is one stride above.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        above = 0 if self.endpoint else 1
        if trained := schedule.whole_timesteps:
            refuse_more_than_trained(trained, steps + above)
            stride = trained // (steps + above)
            times = (np.arange(steps)[::-1] + above) * stride + self.offset
            return np.minimum(times, trained - 1).astype(np.float64)
        every = schedule.uniform(steps + above + 1, schedule.t_start, schedule.t_end)
        return every[1 : steps + 1]


class Trailing(Spacing, frozen=True):
    """Equal strides counted down from the noisiest level."""

    summary: ClassVar[str] = (
        "Equal strides that start at the noisiest level; the right one for few steps."
    )
    source: ClassVar[str] = "Lin et al. (arXiv 2305.08891), section 3.3."
    name: Literal["trailing"] = "trailing"
    rounding: Literal["nearest", "up"] = Field(
        default="nearest",
        description="How times between whole trained timesteps are rounded: nearest, as in "
        "diffusers, or up, as in ComfyUI's `simple`.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if trained := schedule.whole_timesteps:
            refuse_more_than_trained(trained, steps)
            times = trained - np.arange(steps) * (trained / steps)
            return (np.ceil(times) if self.rounding == "up" else np.round(times)) - 1
        return schedule.uniform(steps + 1, schedule.t_start, 0.0)[:-1]


class Linspace(Spacing, frozen=True):
    """Equal strides over the whole trained range."""

    summary: ClassVar[str] = "Equal strides from the noisiest to the cleanest trained level."
    source: ClassVar[str] = "k-diffusion and diffusers, the `linspace` spacing."
    name: Literal["linspace"] = "linspace"
    endpoint: bool = Field(
        default=True,
        description=(
            "Evaluate at the cleanest level too; if false, as in the DPM-Solver authors' code, "
            "the last evaluation is one stride above."
        ),
    )
    twice_shifted: bool = Field(
        default=False,
        description=(
            "On flow-matching models, shift the cleanest level a second time, as diffusers' "
            "schedulers do where a pipeline gives them no list of levels (Stable Diffusion 3.5)."
        ),
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        count = steps if self.endpoint else steps + 1
        t_end = schedule.t_end
        if self.twice_shifted:
            t_end = float(schedule.time_of_measure(np.array(t_end)))
        times = self.fill(schedule, count, schedule.t_start, t_end)[:steps]
        if trained := schedule.whole_timesteps:
            refuse_more_than_trained(trained, steps)
            return np.round(times)
        return times


class SGMUniform(Spacing, frozen=True):
    """Equal strides that stop one above the cleanest level, without rounding to whole timesteps.

    Apart from the rounding this is ``linspace`` without its endpoint; with ``endpoint`` it is what
    ComfyUI and AUTOMATIC1111 call normal.
    """

    summary: ClassVar[str] = (
        "Equal strides that end one above the cleanest level, without rounding."
    )
    source: ClassVar[str] = "Stability's generative-models, as ComfyUI's `sgm_uniform`."
    name: Literal["sgm_uniform"] = "sgm_uniform"
    endpoint: bool = Field(
        default=False,
        description="Evaluate at the cleanest level too, as ComfyUI's `normal` does.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        count = steps if self.endpoint else steps + 1
        return self.fill(schedule, count, schedule.t_start, schedule.t_end)[:steps]


class TimeQuadratic(Spacing, frozen=True):
    """Even in the square root of time: strides that shrink towards the clean end.

    With ``reach`` 0.8 these are DDIM's quadratic timesteps before rounding; with 1 they are those
    that the DPM-Solver authors call `time_quadratic`. On an EDM schedule this is karras with rho 2.
    """

    summary: ClassVar[str] = "Even in the square root of time; good for 7 to 10 steps."
    source: ClassVar[str] = "DDIM (arXiv 2010.02502), appendix D.2; DPM-Solver's `time_quadratic`."
    name: Literal["time_quadratic"] = "time_quadratic"
    reach: float = Field(
        default=1.0,
        ge=0.5,
        le=1,
        description="Where a run starts, as a fraction of all time; DDIM's authors use 0.8.",
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        first, last = np.sqrt(schedule.measure(np.array([t_start, t_end])))
        return schedule.time_of_measure(np.linspace(first, last, count) ** 2)

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        noisiest = schedule.whole_timesteps or schedule.measure(np.array(schedule.t_start))
        start = schedule.time_of_measure(np.array(self.reach * noisiest))
        return self.fill(schedule, steps, min(float(start), schedule.t_start), schedule.t_end)


class Karras(LevelSpacing, frozen=True):
    """Even in sigma^(1/rho): many steps at low noise."""

    summary: ClassVar[str] = "Even in sigma^(1/rho); spends many steps on fine detail."
    source: ClassVar[str] = "Karras et al. (arXiv 2206.00364), equation 5."
    name: Literal["karras"] = "karras"
    rho: float = Field(
        default=7.0, ge=1, le=100, description="Larger values spend more steps at low noise."
    )

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        ends = schedule.half_log_snr(np.array([finite_start(schedule, t_start), t_end]))
        # sigma / alpha = exp(-half log SNR)
        first, last = np.exp(-ends / self.rho)
        ratio = np.linspace(first, last, count) ** self.rho
        return schedule.time_of_half_log_snr(-np.log(ratio))


class LogSNR(LevelSpacing, frozen=True):
    """Even in log(alpha / sigma)."""

    summary: ClassVar[str] = "Even in log SNR; the natural variable of exponential integrators."
    source: ClassVar[str] = "DPM-Solver (arXiv 2206.00927), section 3.4."
    name: Literal["logsnr"] = "logsnr"

    @override
    def fill(self, schedule: Levels, count: int, t_start: float, t_end: float) -> F64:
        ends = schedule.half_log_snr(np.array([finite_start(schedule, t_start), t_end]))
        return schedule.time_of_half_log_snr(np.linspace(ends[0], ends[1], count))


class LCMSpacing(ListedSpacing, frozen=True):
    """The times that latent consistency models were distilled at."""

    summary: ClassVar[str] = (
        "A selection of the 50 times that consistency models were distilled at."
    )
    source: ClassVar[str] = "LCM (arXiv 2310.04378), algorithm 3."
    needs_whole_timesteps: ClassVar[bool] = True
    name: Literal["lcm"] = "lcm"
    distilled_steps: int = Field(
        default=50,
        ge=1,
        le=1000,
        description="Number of steps of the solver that the model was distilled from.",
    )

    @override
    def evaluated(self, schedule: Levels, steps: int) -> F64:
        if not (trained := schedule.whole_timesteps):
            raise PlanError(
                "spacing",
                "spacing is 'lcm', which needs a model with whole trained timesteps; "
                "use 'trailing' with this one.",
            )
        refuse_more_than_trained(trained, self.distilled_steps, "spacing.distilled_steps")
        if steps > self.distilled_steps:
            raise PlanError(
                "steps", f"steps is {steps}; the spacing 'lcm' has at most {self.distilled_steps}."
            )
        stride = trained // self.distilled_steps
        distilled = np.arange(self.distilled_steps, 0, -1) * stride - 1
        picked = np.floor(np.linspace(0, self.distilled_steps, steps, endpoint=False))
        return distilled[picked.astype(np.intp)].astype(np.float64)

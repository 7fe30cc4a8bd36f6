"""Noise schedules: the signal and noise scales of a model, and their inverse.

Every model is put in the form ``x = alpha * x0 + sigma * eps``. A schedule maps its own time ``t``
to ``(alpha, sigma)`` and to the number that the network is conditioned on, and maps a half-log-SNR
``log(alpha / sigma)`` back to a time. Everything is float64 numpy, as tables are built only once
per request.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from typing_extensions import override

from samplers.arguments import number, whole_number
from samplers.grid import Grid
from samplers.levels import Levels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from samplers.levels import F64
    from samplers.spacing import Spacing

TRAINED_STEPS = 1000
MAX_TRAINED_STEPS = 100_000
"""Upper limit, a hundred times the usual number. A schedule with betas stores one number for each
timestep, so an unlimited count in a model's config could exhaust memory."""

BETAS: Final[Mapping[tuple[str, ...], tuple[float, float, str]]] = {
    ("DPMSolverSDE", "Heun", "KDPM2"): (0.00085, 0.012, "linear"),
    ("LCM", "TCD"): (0.00085, 0.012, "scaled_linear"),
    ("",): (0.0001, 0.02, "linear"),
}
"""Entries beta_start, beta_end and beta_schedule of configs that lack them, by prefixes of the
schedulers of diffusers that have them as defaults."""

ENDS_WITHOUT_SIGNAL = "DDIM", "DDPM", "LCM", "TCD"
"""Schedulers of diffusers whose last alpha is 0 with zero terminal SNR; others use 2^-12."""


class NoiseSchedule(Levels):
    """The noise levels of a model, and the grids of runs over them; there are five kinds."""

    def grid(
        self,
        spacing: Spacing | str,
        steps: int,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> Grid:
        """The grid of a run of ``steps`` steps.

        Args:
            spacing: how the steps are placed; a bare name means that spacing with its defaults.
            steps: number of steps, at least 1.
            t_start: time to start from; by default the schedule's noisiest.
            t_end: time to land on, with sigma > 0. By default the last step lands on the clean
                picture. The last evaluation is then where the spacing places it or, if ``t_start``
                is given, at the cleanest trained level.

        Raises:
            ValueError: ``steps`` is below 1, times lie outside the schedule or out of order, the
                name is unknown, or the spacing does not suit the schedule.
        """
        if isinstance(spacing, str):
            # Not at the top: the spacings of installed packages import this one.
            from samplers.spacings import spacing_named

            spacing = spacing_named(spacing)
        return Grid.of(self, spacing, steps, t_start, t_end)

    @staticmethod
    def from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes.

        Raises:
            ValueError: the config has an unknown beta schedule, a shift that depends on the size
                of the picture, or numbers that are not valid for a schedule.
        """
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "use_dynamic_shifting is true; only a shift that is the same for all sizes, "
                "`shift` or `flow_shift`, is allowed."
            )
        # The config of a scheduler that was constructed, not loaded, does not name its class.
        name = str(config.get("_class_name", ""))
        has_betas = "beta_schedule" in config
        if (
            name.startswith("FlowMatch")
            or config.get("use_flow_sigmas")
            or ("shift" in config and not has_betas)
        ):
            shifts = (config.get("shift"), config.get("flow_shift"), 1.0)
            trained = _trained_steps(config)
            return FlowMatching(
                shift=next(shift for shift in shifts if shift is not None),
                trained_steps=trained,
                noisiest=1 - 1 / trained if leaves_out_pure_noise(config) else 1.0,
            )
        if name.startswith("SCM") or config.get("prediction_type") == "trigflow":
            return TrigFlow()
        if name.startswith("EDM") or ("sigma_data" in config and not has_betas):
            return EDM(
                sigma_min=config.get("sigma_min", 0.002),
                sigma_max=config.get("sigma_max", 80.0),
            )
        # Without the entry a PNDMScheduler lands on the first trained step, unlike all others; a
        # TCDScheduler always does.
        clean = config.get("set_alpha_to_one", not name.startswith("PNDM"))
        clean = clean and not name.startswith("TCD")
        kind, log_alphas = DiscreteVP, _log_alphas_of(config)
        if config.get("rescale_betas_zero_snr"):
            # Where there is no signal, a noise prediction says nothing about the picture.
            of_noise = config.get("prediction_type", "epsilon") == "epsilon"
            exact = name.startswith(ENDS_WITHOUT_SIGNAL) and not of_noise
            kind = ZeroTerminalVP if exact else DiscreteVP
            log_alphas = _without_final_signal(log_alphas, 2.0**-20 if exact else 2.0**-12)
        return kind(log_alphas, set_alpha_to_one=clean is not False)

    @staticmethod
    def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """Continuous variance-preserving schedule with linear beta on t in [0, 1] (Score SDE).

        Raises:
            ValueError: unless ``0 < beta_min <= beta_max``.
        """
        return LinearVP(beta_min, beta_max)

    @staticmethod
    def flow(
        shift: float = 1.0, *, terminal: float | None = None, steps: int | None = None
    ) -> NoiseSchedule:
        """Rectified flow, alpha = 1 - sigma; ``shift`` > 1 spends more steps at high noise.

        Args:
            shift: shift of even times u, ``shift u / (1 + (shift - 1) u)``.
            terminal: sigma of the last evaluation of a run of ``steps`` steps with spacing
                ``trailing``; all levels are stretched to reach it. None for no stretching.
            steps: number of steps of that run; a run of 1 step is not stretched.

        Raises:
            ValueError: ``shift`` is not above 0, ``terminal`` is not within (0, 1), or only one of
                ``terminal`` and ``steps`` is given.
        """
        if terminal is not None and steps == 1:
            terminal = steps = None
        return FlowMatching(shift=shift, terminal=terminal, steps=steps)

    @staticmethod
    def trigflow() -> NoiseSchedule:
        """Continuous-time consistency models: alpha = cos t, sigma = sin t (arXiv 2410.11081).

        Latents are those of the model divided by its ``sigma_data``.
        """
        return TrigFlow()

    @staticmethod
    def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
        """Variance exploding, alpha = 1 and t = sigma (Karras et al., arXiv 2206.00364).

        Raises:
            ValueError: unless ``0 < sigma_min < sigma_max``.
        """
        return EDM(sigma_min, sigma_max)


def leaves_out_pure_noise(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler starts a flow at its second noisiest trained level."""
    solver = str(config.get("_class_name", "")).startswith(("DEIS", "DPMSolver", "SASolver"))
    return solver and bool(config.get("use_flow_sigmas"))


class VariancePreserving(NoiseSchedule):
    """What the variance-preserving kinds share: everything follows from log alpha."""

    unit_start: ClassVar[bool] = True

    @abstractmethod
    def log_alpha(self, t: F64) -> F64:
        """``log(alpha)`` at times ``t``."""

    @override
    def level(self, t: F64) -> tuple[F64, F64]:
        log_alpha = self.log_alpha(t)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    @override
    def level_of_half_log_snr(self, half_log_snr: F64) -> tuple[F64, F64]:
        log_alpha = log_alpha_of_half_log_snr(half_log_snr)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    @override
    def half_log_snr(self, t: F64) -> F64:
        # Not log(1 - alpha^2), which cancels completely near t = 0.
        return -0.5 * np.log(np.expm1(-2 * self.log_alpha(t)))


def log_alpha_of_half_log_snr(half_log_snr: F64) -> F64:
    """``log(alpha)`` of a variance-preserving level from its ``log(alpha / sigma)``."""
    return -0.5 * np.logaddexp(0.0, -2 * np.asarray(half_log_snr, np.float64))


@dataclass(frozen=True, eq=False)
class DiscreteVP(VariancePreserving):
    """A variance-preserving schedule trained at whole timesteps 0 .. T - 1.

    Between trained steps log alpha is interpolated linearly.
    """

    log_alphas: F64 = field(repr=False)
    set_alpha_to_one: bool = True

    @property
    @override
    def clean_end(self) -> bool:
        """The value of ``set_alpha_to_one`` in diffusers' configs."""
        return self.set_alpha_to_one

    @property
    @override
    def whole_timesteps(self) -> int:
        """T, the number of trained timesteps."""
        return len(self.log_alphas)

    @property
    @override
    def t_start(self) -> float:
        """The last trained step."""
        return float(self.whole_timesteps - 1)

    @property
    @override
    def t_end(self) -> float:
        """The first trained step."""
        return 0.0

    @override
    def log_alpha(self, t: F64) -> F64:
        return np.interp(t, np.arange(self.whole_timesteps), self.log_alphas)

    @override
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        log_alpha = log_alpha_of_half_log_snr(half_log_snr)
        return np.interp(-log_alpha, -self.log_alphas, np.arange(self.whole_timesteps))


class ZeroTerminalVP(DiscreteVP):
    """A schedule whose last trained step is pure noise (Lin et al., arXiv 2305.08891).

    Alpha is 2^-20 there, too little to change a float32 prediction.
    """

    @override
    def noise_level(self, t: F64) -> F64:
        """Sigma of the flow-matching schedule at the same SNR, at most 1."""
        alpha, sigma = self.level(t)
        return sigma / (alpha + sigma)

    @override
    def time_of_noise_level(self, noise_level: F64) -> F64:
        with np.errstate(divide="ignore"):
            return self.time_of_half_log_snr(np.log1p(-noise_level) - np.log(noise_level))

    @override
    def line_scale(self, alpha: F64) -> F64:
        # The line of that flow-matching schedule, as sigma / alpha is a million at pure noise.
        return alpha + np.sqrt(1 - alpha**2)


@dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min) on t in [0, 1]."""

    beta_min: float
    beta_max: float

    def __post_init__(self) -> None:
        least, most = number("beta_min", self.beta_min), number("beta_max", self.beta_max)
        if not 0 < least <= most < np.inf:
            raise ValueError(
                f"beta_min is {least:g} and beta_max is {most:g}; beta_min must be above 0, and "
                "beta_max finite and not below it."
            )

    @property
    @override
    def t_start(self) -> float:
        """The noisiest time."""
        return 1.0

    @property
    @override
    def t_end(self) -> float:
        """The usual cut-off, where log alpha is still accurate."""
        return 1e-3

    @override
    def log_alpha(self, t: F64) -> F64:
        slope = self.beta_max - self.beta_min
        return -0.25 * np.square(t) * slope - 0.5 * np.asarray(t) * self.beta_min

    @override
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        slope = self.beta_max - self.beta_min
        twice = -2 * log_alpha_of_half_log_snr(half_log_snr)
        # The root of slope/2 t^2 + beta_min t = twice, in a form without cancellation.
        return 2 * twice / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * slope * twice))


@dataclass(frozen=True)
class FlowMatching(NoiseSchedule):
    """Rectified flow: sigma = t, alpha = 1 - t on t in [0, 1]; the network is given T * t.

    With a ``terminal``, the shifted levels from pure noise to the last evaluation of a run of
    ``steps`` trailing steps are stretched so that this evaluation has the sigma ``terminal``
    (``shift_terminal`` of diffusers' config); from there sigma falls linearly to 0. ``noisiest``
    is the time of the noisiest level before the shift.
    """

    tail_rounds_up: ClassVar[bool] = True

    shift: float = 1.0
    trained_steps: int = TRAINED_STEPS
    terminal: float | None = None
    steps: int | None = None
    noisiest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < number("shift", self.shift) < np.inf:
            raise ValueError(f"shift is {self.shift:g}; it must be finite and above 0.")
        whole_number("trained_steps", self.trained_steps, least=2)
        if (self.terminal is None) != (self.steps is None):
            raise ValueError("terminal and steps go together; give both or neither.")
        if self.terminal is not None and not 0 < number("terminal", self.terminal) < 1:
            raise ValueError(f"terminal is {self.terminal:g}; it must be above 0 and below 1.")
        if self.steps is not None:
            whole_number("steps", self.steps, least=2)

    @property
    @override
    def t_start(self) -> float:
        """The noisiest time."""
        return float(self.shifted(np.array(self.noisiest)))

    @property
    @override
    def t_end(self) -> float:
        """Sigma of the first trained step, after the shift."""
        return float(self.shifted(np.array(1 / self.trained_steps)))

    def shifted(self, u: F64) -> F64:
        """Sigma at the unshifted time u (SD3, arXiv 2403.03206, section 5.3.2), stretched."""
        sigma = self._unstretched(u)
        if self.terminal is None or self.steps is None:
            return sigma
        below = self.terminal * self.steps * u
        stretched = 1 - self._stretch(self.terminal, self.steps) * (1 - sigma)
        return np.where(below < self.terminal, below, stretched)

    @override
    def measure(self, t: F64) -> F64:
        if self.terminal is None or self.steps is None:
            return self._even(t)
        above = self._even(1 - (1 - t) / self._stretch(self.terminal, self.steps))
        return np.where(t < self.terminal, t / (self.terminal * self.steps), above)

    def _unstretched(self, u: F64) -> F64:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _even(self, sigma: F64) -> F64:
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def _stretch(self, terminal: float, steps: int) -> float:
        """Factor on alpha that brings the last evaluation to ``terminal``."""
        last = float(self._unstretched(np.array(1 / steps)))
        return (1 - terminal) / (1 - last)

    @override
    def time_of_measure(self, measure: F64) -> F64:
        return self.shifted(measure)

    @override
    def level(self, t: F64) -> tuple[F64, F64]:
        t = np.asarray(t, np.float64)
        return 1 - t, t

    @override
    def half_log_snr(self, t: F64) -> F64:
        with np.errstate(divide="ignore"):
            return np.log1p(-np.asarray(t)) - np.log(t)

    @override
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        return np.exp(-np.logaddexp(0.0, half_log_snr))

    @override
    def noise_level(self, t: F64) -> F64:
        return np.asarray(t, np.float64)

    @override
    def time_of_noise_level(self, noise_level: F64) -> F64:
        return noise_level

    @override
    def line_scale(self, alpha: F64) -> F64:
        # x as a function of sigma, whose slope is the velocity; sigma / alpha is infinite at pure
        # noise.
        return np.ones_like(alpha)

    @override
    def conditioning(self, t: F64) -> F64:
        return self.trained_steps * t


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """alpha = cos t, sigma = sin t on t in [0, pi/2] (Lu and Song, arXiv 2410.11081, section 3).

    Applies to latents divided by ``sigma_data``, a factor of both x and the noise in the paper. The
    network's output F is then a ``v_prediction``: ``D = cos(t) x - sin(t) F``. SANA-Sprint's
    network is conditioned on its flow-matching time ``sin t / (cos t + sin t)``, which its model
    family provides.
    """

    unit_start: ClassVar[bool] = True
    tail_rounds_up: ClassVar[bool] = True

    @property
    @override
    def t_start(self) -> float:
        """Pure noise."""
        return np.pi / 2

    @property
    @override
    def t_end(self) -> float:
        """The angle of EDM's smallest trained sigma over its ``sigma_data``, .002 / .5."""
        return float(np.arctan(0.002 / 0.5))

    @override
    def level(self, t: F64) -> tuple[F64, F64]:
        # The sine of the complementary angle is exactly 0 at pure noise; the cosine is not.
        return np.sin(np.pi / 2 - np.asarray(t, np.float64)), np.sin(t)

    @override
    def half_log_snr(self, t: F64) -> F64:
        alpha, sigma = self.level(t)
        with np.errstate(divide="ignore"):
            return np.log(alpha) - np.log(sigma)

    @override
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        return np.arctan(np.exp(-np.asarray(half_log_snr, np.float64)))

    @override
    def noise_level(self, t: F64) -> F64:
        """Sigma of the flow-matching schedule at the same SNR, finite at pure noise."""
        alpha, sigma = self.level(t)
        return sigma / (alpha + sigma)

    @override
    def time_of_noise_level(self, noise_level: F64) -> F64:
        return np.arctan2(noise_level, 1 - noise_level)

    @override
    def line_scale(self, alpha: F64) -> F64:
        # The line of that flow-matching schedule, as sigma / alpha is infinite at pure noise.
        return alpha + np.sqrt(1 - alpha**2)


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance exploding: alpha = 1, sigma = t; the network is given log(sigma) / 4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        least, most = number("sigma_min", self.sigma_min), number("sigma_max", self.sigma_max)
        if not 0 < least < most < np.inf:
            raise ValueError(
                f"sigma_min is {least:g} and sigma_max is {most:g}; sigma_min must be above 0, and "
                "sigma_max finite and above it."
            )

    @property
    @override
    def t_start(self) -> float:
        """The largest trained sigma."""
        return self.sigma_max

    @property
    @override
    def t_end(self) -> float:
        """The smallest trained sigma."""
        return self.sigma_min

    @override
    def level(self, t: F64) -> tuple[F64, F64]:
        t = np.asarray(t, np.float64)
        return np.ones_like(t), t

    @override
    def half_log_snr(self, t: F64) -> F64:
        return -np.log(t)

    @override
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        return np.exp(-np.asarray(half_log_snr))

    @override
    def conditioning(self, t: F64) -> F64:
        return 0.25 * np.log(t)


def _log_alphas_of(config: Mapping[str, Any]) -> F64:
    steps = _trained_steps(config)
    first, last, kind = _defaults_of_betas(config)
    kind = config.get("beta_schedule", kind)
    ends = config.get("beta_start", first), config.get("beta_end", last)
    if config.get("trained_betas") is not None:
        betas = _listed_betas(config["trained_betas"])
    elif kind == "linear":
        betas = np.linspace(*_checked_ends(*ends), steps)
    elif kind == "scaled_linear":
        first, last = np.sqrt(_checked_ends(*ends))
        betas = np.linspace(first, last, steps) ** 2
    elif kind == "squaredcos_cap_v2":
        u = np.arange(steps + 1) / steps
        bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise ValueError(
            f"beta_schedule is {kind!r}; allowed are linear, scaled_linear and squaredcos_cap_v2."
        )
    return 0.5 * np.cumsum(np.log1p(-betas))


def _trained_steps(config: Mapping[str, Any]) -> int:
    given = config.get("num_train_timesteps", TRAINED_STEPS)
    return whole_number("num_train_timesteps", given, least=2, most=MAX_TRAINED_STEPS)


def _defaults_of_betas(config: Mapping[str, Any]) -> tuple[float, float, str]:
    name = str(config.get("_class_name", ""))
    return next(betas for prefixes, betas in BETAS.items() if name.startswith(prefixes))


def _checked_ends(first: Any, last: Any) -> tuple[float, float]:
    first, last = number("beta_start", first), number("beta_end", last)
    if not 0 < first <= last < 1:
        raise ValueError(
            f"beta_start is {first:g} and beta_end is {last:g}; beta_start must be above 0, and "
            "beta_end below 1 and not below beta_start."
        )
    return first, last


def _listed_betas(listed: Any) -> F64:
    refusal = "trained_betas must be a list of at least 2 numbers, each above 0 and below 1."
    try:
        betas = np.asarray(listed, np.float64)
    except (TypeError, ValueError):
        raise ValueError(refusal) from None
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(refusal)
    return betas


def _without_final_signal(log_alphas: F64, last: float) -> F64:
    """Alpha shifted and scaled so that the last is 0 (Lin et al., arXiv 2305.08891, algorithm 1).

    Args:
        log_alphas: logarithms of alpha, decreasing.
        last: last alpha in place of 0, so that its logarithm is finite; 2^-12 in most of diffusers.
            Where the alpha before it is already no higher, as with linear betas, half of that one
            is used instead, so that alpha always decreases.
    """
    alphas = np.exp(log_alphas)
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return np.log(np.append(alphas[:-1], last if alphas[-2] > last else alphas[-2] / 2))

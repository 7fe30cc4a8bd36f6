"""Noise levels: the signal and noise scales of a schedule over time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Always float64; numpy's stubs widen some operations.
F64: TypeAlias = NDArray[np.floating[Any]]


class Levels(ABC):
    """Signal and noise scales over a schedule's own time, and their inverse."""

    unit_start: ClassVar[bool] = False
    """Whether start noise has standard deviation 1 (variance preserving) instead of sigma."""

    tail_rounds_up: ClassVar[bool] = False
    """Whether a share of the steps is rounded up to whole steps, instead of down."""

    @property
    @abstractmethod
    def t_start(self) -> float:
        """Time of the noisiest level a plan may start from."""

    @property
    @abstractmethod
    def t_end(self) -> float:
        """Time of the cleanest level the network was trained on."""

    @property
    def clean_end(self) -> bool:
        """Whether DDIM and PLMS end on the clean picture, or on the cleanest trained level."""
        return True

    @property
    def whole_timesteps(self) -> int | None:
        """T of a schedule trained only at the times 0 .. T - 1; None where time is continuous."""
        return None

    @abstractmethod
    def level(self, t: F64) -> tuple[F64, F64]:
        """Alpha and sigma at times ``t``, each of the shape of ``t``."""

    @abstractmethod
    def time_of_half_log_snr(self, half_log_snr: F64) -> F64:
        """The times at which ``log(alpha / sigma)`` has the given values."""

    @abstractmethod
    def half_log_snr(self, t: F64) -> F64:
        """``log(alpha / sigma)`` at times ``t``."""

    def level_of_half_log_snr(self, half_log_snr: F64) -> tuple[F64, F64]:
        """Alpha and sigma at given ``log(alpha / sigma)``, possibly outside the trained range."""
        return self.level(self.time_of_half_log_snr(half_log_snr))

    def conditioning(self, t: F64) -> F64:
        """The number that the network is conditioned on at time ``t``; by default ``t`` itself."""
        return t

    def noise_level(self, t: F64) -> F64:
        """What other programs call sigma: ``sigma / alpha``; on flow matching, sigma itself."""
        return np.exp(-self.half_log_snr(t))

    def time_of_noise_level(self, noise_level: F64) -> F64:
        """The times at which :meth:`noise_level` has the given values."""
        return self.time_of_half_log_snr(-np.log(noise_level))

    def line_scale(self, alpha: F64) -> F64:
        """The scale of the line along which solvers integrate the probability-flow ODE.

        With ``y = x / scale`` the ODE is ``dy / ds = (x - scale D) / sigma``, ``s = sigma /
        scale``. By default the scale is alpha, and the slope is eps.

        Args:
            alpha: signal scales of the points.

        Returns:
            The scale at each point, of the shape of ``alpha``.
        """
        return alpha

    def measure(self, t: F64) -> F64:
        """The variable in which spacings that are even in time are even; by default time itself."""
        return t

    def time_of_measure(self, measure: F64) -> F64:
        """The times at which :meth:`measure` has the given values."""
        return measure

    def uniform(self, count: int, t_start: float, t_end: float) -> F64:
        """``count`` times from ``t_start`` to ``t_end``, evenly spaced in :meth:`measure`."""
        first, last = self.measure(np.array([t_start, t_end]))
        return self.time_of_measure(np.linspace(first, last, count))

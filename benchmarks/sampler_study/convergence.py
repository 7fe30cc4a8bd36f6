"""Errors on a Gaussian mixture, whose flow is known: the slope of each sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from samplers import SAMPLERS, NoiseSchedule, integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import LogSNR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from samplers import Sampler

COUNTS = (5, 10, 20, 40, 80, 160, 320)
SLOPE_COUNTS = COUNTS[-3:]
"""Evaluations that the slope is read from."""
T_START, T_END = 1.0, 0.02
POINTS = 17
REACH = 1.6


def solvers() -> Iterator[Sampler]:
    """Each registered deterministic sampler with its defaults, at each order that it offers."""
    for kind in SAMPLERS:
        fields = kind.model_fields
        settings: dict[str, Any] = {}
        if "lower_order_final" in fields:
            # A matter of few steps, which would hide the slope.
            settings["lower_order_final"] = False
        if "statistics" in fields:
            settings["statistics"] = "none"
        whole = "order" in fields and fields["order"].annotation is not float
        for order in _orders(fields["order"].annotation) if whole else (None,):
            chosen = settings if order is None else settings | {"order": order}
            sampler = kind.model_validate(chosen)
            if sampler.convergence_order > 0:
                yield sampler


def _orders(annotation: Any) -> Sequence[int]:
    return getattr(annotation, "__args__", ())


def errors(sampler: Sampler, counts: Sequence[int]) -> list[float]:
    """Largest distance from the exact flow at each number of evaluations, in float64.

    Raises:
        ValueError: the sampler refuses the first of them.
    """
    schedule = NoiseSchedule.vp_linear()
    data = GaussianMixtureDenoiser(schedule)
    reach = REACH * float(data.spread(T_START).max())
    x = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)[None]
    exact = data.transport(x, T_START, T_END)
    found: list[float] = []
    for count in counts:
        # With two evaluations a step, an odd number cannot be had: one less is made.
        steps = max(1, count // sampler.evaluations_per_step)
        plan = sampler.plan(schedule.grid(LogSNR(), steps, T_START, T_END))
        found.append(float((integrate(plan, data, x) - exact).abs().max()))
    return found

"""Errors on a Gaussian mixture, whose flow is known exactly, and the slope of each sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import torch

from samplers import SAMPLERS, NoiseSchedule, integrate
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import MomentumSampler
from samplers.linear_multistep import Weights
from samplers.timesteps import LogSNR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic.fields import FieldInfo

    from samplers import Sampler

COUNTS = (5, 10, 20, 40, 80, 160, 320)
SLOPE_COUNTS = COUNTS[-3:]
"""Numbers of evaluations from which the slope is determined."""
T_START, T_END = 1.0, 0.02
MOMENTUM_ORDERS = (1.8, 3.8)
V3_FLAGS = ((1, "none"), (2, "none"), (2, "exact"), (2, "pseudo"), (3, "exact"))
"""Orders and correctors, all given explicitly so that results do not depend on a preset."""
POINTS = 17
REACH = 1.6


def solvers() -> Iterator[Sampler]:
    """Each registered deterministic sampler with its defaults, at each whole order it offers."""
    for kind in SAMPLERS:
        fields = kind.model_fields
        settings: dict[str, Any] = {}
        if "lower_order_final" in fields:
            # Lowering matters only for few steps and would hide the slope.
            settings["lower_order_final"] = False
        if "statistics" in fields:
            settings["statistics"] = "none"
        for choice in _choices(kind):
            sampler = kind.model_validate(settings | choice)
            if sampler.convergence_order > 0:
                yield sampler


def _choices(kind: type[Sampler]) -> list[dict[str, Any]]:
    if issubclass(kind, MomentumSampler):
        return [{"order": o, "weights": w} for o in MOMENTUM_ORDERS for w in get_args(Weights)]
    if issubclass(kind, DPMSolverV3):
        return [{"order": o, "predictor": "exact", "corrector": c} for o, c in V3_FLAGS]
    orders = _orders(kind.model_fields["order"]) if "order" in kind.model_fields else []
    return [{"order": order} for order in orders] or [{}]


def _orders(field: FieldInfo) -> list[int]:
    """The integers among a field's literal values."""
    named = (get_args(one) or (one,) for one in get_args(field.annotation))
    return [value for values in named for value in values if isinstance(value, int)]


def errors(sampler: Sampler, counts: Sequence[int]) -> list[float]:
    """Largest distance from the exact flow at each number of evaluations, in float64.

    Raises:
        ValueError: the sampler refuses one of these numbers.
    """
    schedule = NoiseSchedule.vp_linear()
    data = GaussianMixtureDenoiser(schedule)
    reach = REACH * float(data.spread(T_START).max())
    x = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)[None]
    exact = data.transport(x, T_START, T_END)
    found: list[float] = []
    for count in counts:
        most = count // sampler.evaluations_per_step
        grids = (schedule.grid(LogSNR(), steps, T_START, T_END) for steps in range(most, 0, -1))
        # With several evaluations a step not every number is possible; the next lower one is used.
        plan = next(plan for plan in map(sampler.plan, grids) if plan.evaluations <= count)
        found.append(float((integrate(plan, data, x) - exact).abs().max()))
    return found

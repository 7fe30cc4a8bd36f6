"""Diffusion samplers as tables: pure mathematics, usable without the server."""

from samplers.grid import Grid
from samplers.noise_schedule import NoiseSchedule
from samplers.plan import Columns, Plan, advance, integrate
from samplers.prediction import Preconditioning, PredictionType, preconditioning
from samplers.registry import SAMPLERS, SPACINGS
from samplers.sampler import Sampler
from samplers.timesteps import Spacing

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Columns",
    "Grid",
    "NoiseSchedule",
    "Plan",
    "Preconditioning",
    "PredictionType",
    "Sampler",
    "Spacing",
    "advance",
    "integrate",
    "preconditioning",
]

"""Diffusion samplers as tables: pure mathematics, usable without the server."""

from typing import TYPE_CHECKING, Any

from samplers.grid import Grid
from samplers.noise_schedule import NoiseSchedule
from samplers.plan import Columns, Plan, advance, integrate
from samplers.prediction import Preconditioning, PredictionType, preconditioning
from samplers.sampler import Sampler
from samplers.spacing import Spacing
from samplers.statistics import Statistics, StatisticsIdentity

# isort: split
# Last, as the samplers and spacings of installed packages import the names above.
from samplers.registry import SAMPLERS
from samplers.spacings import SPACINGS

if TYPE_CHECKING:
    from samplers.model_statistics import compute_statistics

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
    "Statistics",
    "StatisticsIdentity",
    "advance",
    "compute_statistics",
    "integrate",
    "preconditioning",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    if name == "compute_statistics":
        from samplers.model_statistics import compute_statistics

        return compute_statistics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

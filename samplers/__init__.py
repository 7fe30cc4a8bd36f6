"""Diffusion samplers as tables: pure mathematics, usable without the server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samplers.align_your_steps import AlignYourSteps
from samplers.angles import Angles
from samplers.beta import Beta
from samplers.bong_tangent import BongTangent
from samplers.custom_times import Custom
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_2 import DPM2
from samplers.dpm_fast import DPMFast
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_pp_sde import DPMSolverPPSDE
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.er_sde import ERSDE
from samplers.euler import Euler, EulerAncestral
from samplers.exponential import Exponential
from samplers.gradient_estimation import GradientEstimation
from samplers.grid import Grid
from samplers.heavy_ball import GHVB, HB, Nesterov
from samplers.heun import Heun
from samplers.heunpp2 import HeunPP2
from samplers.kl_optimal import KLOptimal
from samplers.laplace import Laplace
from samplers.lcm import LCM
from samplers.linear_quadratic import LinearQuadratic
from samplers.lms import LMS
from samplers.noise_schedule import NoiseSchedule
from samplers.plan import Columns, Plan, advance, integrate
from samplers.plan_error import PlanError
from samplers.plms import PLMS
from samplers.prediction import Preconditioning, PredictionType, preconditioning
from samplers.restart import Restart
from samplers.sa_solver import SASolver
from samplers.sa_solver_pece import SASolverPECE
from samplers.sampler import FittedSampler, Sampler
from samplers.score_sde_pc import ScoreSDEPC
from samplers.seeds import SEEDS
from samplers.spacing import Spacing
from samplers.statistics import Statistics, StatisticsIdentity
from samplers.tcd import TCD
from samplers.timesteps import (
    Karras,
    LCMSpacing,
    Leading,
    Linspace,
    LogSNR,
    SGMUniform,
    TimeQuadratic,
    Trailing,
)
from samplers.unipc import UniPC

if TYPE_CHECKING:
    from samplers.model_statistics import compute_statistics
    from samplers.registry import SAMPLERS
    from samplers.spacings import SPACINGS

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "ERSDE",
    "GHVB",
    "HB",
    "LCM",
    "LMS",
    "PLMS",
    "SAMPLERS",
    "SEEDS",
    "SPACINGS",
    "TCD",
    "AlignYourSteps",
    "Angles",
    "Beta",
    "BongTangent",
    "Columns",
    "Custom",
    "DPMFast",
    "DPMSolverPP",
    "DPMSolverPPSDE",
    "DPMSolverPPSinglestep",
    "DPMSolverV3",
    "Euler",
    "EulerAncestral",
    "Exponential",
    "FittedSampler",
    "GradientEstimation",
    "Grid",
    "Heun",
    "HeunPP2",
    "KLOptimal",
    "Karras",
    "LCMSpacing",
    "Laplace",
    "Leading",
    "LinearQuadratic",
    "Linspace",
    "LogSNR",
    "Nesterov",
    "NoiseSchedule",
    "Plan",
    "PlanError",
    "Preconditioning",
    "PredictionType",
    "Restart",
    "SASolver",
    "SASolverPECE",
    "SGMUniform",
    "Sampler",
    "ScoreSDEPC",
    "Spacing",
    "Statistics",
    "StatisticsIdentity",
    "TimeQuadratic",
    "Trailing",
    "UniPC",
    "advance",
    "compute_statistics",
    "integrate",
    "preconditioning",
]


_LATER = {
    # Needs torch.
    "compute_statistics": "samplers.model_statistics",
    # Load the samplers and spacings of installed packages, which import the names above.
    "SAMPLERS": "samplers.registry",
    "SPACINGS": "samplers.spacings",
}


def __getattr__(name: str) -> Any:
    """Names that are imported when they are first used, not with the package."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)

"""All samplers: ours, and those of installed packages."""

from __future__ import annotations

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
from samplers.gradient_estimation import GradientEstimation
from samplers.heavy_ball import GHVB, HB, Nesterov
from samplers.heun import Heun
from samplers.heunpp2 import HeunPP2
from samplers.lcm import LCM
from samplers.lms import LMS
from samplers.plms import PLMS
from samplers.restart import Restart
from samplers.sa_solver import SASolver
from samplers.sa_solver_pece import SASolverPECE
from samplers.sampler import Sampler
from samplers.score_sde_pc import ScoreSDEPC
from samplers.seeds import SEEDS
from samplers.tcd import TCD
from samplers.unipc import UniPC
from weft_plugins import with_plugins

SAMPLERS: tuple[type[Sampler], ...] = with_plugins(
    "weft.samplers",
    Sampler,
    (
        DDIM,
        Euler,
        EulerAncestral,
        Heun,
        DPM2,
        DPMFast,
        DPMSolverPP,
        DPMSolverPPSinglestep,
        DPMSolverPPSDE,
        UniPC,
        DPMSolverV3,
        DEIS,
        PLMS,
        HB,
        Nesterov,
        GHVB,
        GradientEstimation,
        LMS,
        HeunPP2,
        SASolver,
        SASolverPECE,
        ERSDE,
        SEEDS,
        ScoreSDEPC,
        Restart,
        LCM,
        TCD,
    ),
)

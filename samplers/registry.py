"""All samplers: ours, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.euler import Euler, EulerAncestral
from samplers.heavy_ball import GHVB, HB, Nesterov
from samplers.heun import Heun
from samplers.lcm import LCM
from samplers.plms import PLMS
from samplers.restart import Restart
from samplers.sa_solver import SASolver
from samplers.score_sde_pc import ScoreSDEPC
from samplers.tcd import TCD
from samplers.unipc import UniPC

if TYPE_CHECKING:
    from samplers.sampler import Sampler

SAMPLERS: tuple[type[Sampler], ...] = (
    DDIM,
    Euler,
    EulerAncestral,
    Heun,
    DPMSolverPP,
    DPMSolverPPSinglestep,
    UniPC,
    DPMSolverV3,
    DEIS,
    PLMS,
    HB,
    Nesterov,
    GHVB,
    SASolver,
    ScoreSDEPC,
    Restart,
    LCM,
    TCD,
    *(entry.load() for entry in entry_points(group="weft.samplers")),
)

"""All samplers: ours, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.euler import Euler, EulerAncestral
from samplers.heun import Heun
from samplers.lcm import LCM
from samplers.unipc import UniPC

if TYPE_CHECKING:
    from samplers.sampler import Sampler

SAMPLERS: tuple[type[Sampler], ...] = (
    DDIM,
    Euler,
    EulerAncestral,
    Heun,
    DPMSolverPP,
    UniPC,
    DPMSolverV3,
    LCM,
    *(entry.load() for entry in entry_points(group="weft.samplers")),
)

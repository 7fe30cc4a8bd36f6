"""All guidance rules, policies and perturbations: ours, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.apg import APG
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.interval import Interval
from guidance.pag import PAG
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.unguided import Unguided

if TYPE_CHECKING:
    from guidance.perturbation import Perturbation
    from guidance.policy import Policy
    from guidance.rule import Rule

RULES: tuple[type[Rule], ...] = (
    Unguided,
    CFG,
    APG,
    CFGPlusPlus,
    *(entry.load() for entry in entry_points(group="weft.guidance_rules")),
)

POLICIES: tuple[type[Policy], ...] = (
    Always,
    Interval,
    Adaptive,
    *(entry.load() for entry in entry_points(group="weft.guidance_policies")),
)

PERTURBATIONS: tuple[type[Perturbation], ...] = (
    PAG,
    SEG,
    SLG,
    Autoguidance,
    *(entry.load() for entry in entry_points(group="weft.guidance_perturbations")),
)

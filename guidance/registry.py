"""All rules, policies, perturbations and classifiers' terms: ours and those of packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.apg import APG
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.cfg_rescale import CFGRescale
from guidance.cfg_zero_star import CFGZeroStar
from guidance.composed import Composed
from guidance.dynamic_thresholding import DynamicThresholding
from guidance.elucd import EluCD
from guidance.embedded import Embedded
from guidance.frequency_decoupled import FrequencyDecoupled
from guidance.gradient_free import GradientFree
from guidance.interval import Interval
from guidance.linear_adaptive import LinearAdaptive
from guidance.magnitude_aware import MagnitudeAware
from guidance.minority import Minority
from guidance.pag import PAG
from guidance.perp_neg import PerpNeg
from guidance.residual import Residual
from guidance.reuse import Reuse
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.tcfg import TCFG
from guidance.unguided import Unguided

if TYPE_CHECKING:
    from guidance.classifier_guidance import ClassifierGuidance
    from guidance.perturbation import Perturbation
    from guidance.policy import Policy
    from guidance.rule import Rule

RULES: tuple[type[Rule], ...] = (
    Unguided,
    CFG,
    APG,
    CFGPlusPlus,
    CFGRescale,
    CFGZeroStar,
    DynamicThresholding,
    TCFG,
    FrequencyDecoupled,
    MagnitudeAware,
    PerpNeg,
    Composed,
    *(entry.load() for entry in entry_points(group="weft.guidance_rules")),
)

POLICIES: tuple[type[Policy], ...] = (
    Always,
    Interval,
    Adaptive,
    LinearAdaptive,
    Reuse,
    Residual,
    Embedded,
    *(entry.load() for entry in entry_points(group="weft.guidance_policies")),
)

PERTURBATIONS: tuple[type[Perturbation], ...] = (
    PAG,
    SEG,
    SLG,
    Autoguidance,
    *(entry.load() for entry in entry_points(group="weft.guidance_perturbations")),
)

CLASSIFIERS: tuple[type[ClassifierGuidance], ...] = (
    EluCD,
    Minority,
    GradientFree,
    *(entry.load() for entry in entry_points(group="weft.guidance_classifiers")),
)

"""All rules, policies, perturbations, classifier terms and step caches, installed ones included."""

from __future__ import annotations

from typing import Final

from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.apg import APG
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.cfg_rescale import CFGRescale
from guidance.cfg_zero_star import CFGZeroStar
from guidance.classifier_guidance import ClassifierGuidance
from guidance.composed import Composed
from guidance.dynamic_thresholding import DynamicThresholding
from guidance.easy_cache import EasyCache
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
from guidance.perturbation import Perturbation
from guidance.policy import Policy
from guidance.residual import Residual
from guidance.reuse import Reuse
from guidance.rule import Rule
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.step_cache import StepCache
from guidance.tcfg import TCFG
from guidance.unguided import Unguided
from weft_plugins import with_plugins

BESIDE_RULES: Final = (
    "policy",
    "perturbed",
    "classifier",
    "skip_tuning",
    "freeu",
    "particles",
    "negtome",
    "nag",
    "cfg_norm",
)
"""Fields of a request's guidance that do not belong to its rule (guidance/parts.py)."""

RULES: tuple[type[Rule], ...] = with_plugins(
    "weft.guidance_rules",
    Rule,
    (
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
    ),
    BESIDE_RULES,
)

POLICIES: tuple[type[Policy], ...] = with_plugins(
    "weft.guidance_policies",
    Policy,
    (
        Always,
        Interval,
        Adaptive,
        LinearAdaptive,
        Reuse,
        Residual,
        Embedded,
    ),
)

PERTURBATIONS: tuple[type[Perturbation], ...] = with_plugins(
    "weft.guidance_perturbations",
    Perturbation,
    (
        PAG,
        SEG,
        SLG,
        Autoguidance,
    ),
)

CLASSIFIERS: tuple[type[ClassifierGuidance], ...] = with_plugins(
    "weft.guidance_classifiers",
    ClassifierGuidance,
    (
        EluCD,
        Minority,
        GradientFree,
    ),
)

STEP_CACHES: tuple[type[StepCache], ...] = with_plugins("weft.step_caches", StepCache, (EasyCache,))

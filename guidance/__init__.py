"""Guidance: rules, policies, perturbations and classifiers' terms, usable without the server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.apg import APG
from guidance.autoguidance import Autoguidance
from guidance.branch import EMPTY, NEGATIVE, Branch
from guidance.cfg import CFG
from guidance.cfg_norm import CFGNorm
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.cfg_rescale import CFGRescale
from guidance.cfg_zero_star import CFGZeroStar
from guidance.classifier_guidance import (
    ClassifierGuidance,
    GradientGuidance,
    Reference,
    ReferenceGuidance,
)
from guidance.composed import Composed, WeightedPrompt
from guidance.diffusion_levels import DiffusionLevels
from guidance.dynamic_thresholding import DynamicThresholding
from guidance.easy_cache import EasyCache
from guidance.edits import Edit
from guidance.elucd import EluCD
from guidance.feynman_kac import FeynmanKac
from guidance.freeu import FreeU
from guidance.frequency_decoupled import FrequencyDecoupled
from guidance.gradient_free import GradientFree
from guidance.interval import Interval
from guidance.inversion import invert
from guidance.loop import guide
from guidance.magnitude_aware import MagnitudeAware
from guidance.minority import Minority
from guidance.nag import NAG
from guidance.negtome import NegToMe
from guidance.network_change import NetworkChange
from guidance.pag import PAG
from guidance.perp_neg import PerpNeg
from guidance.perturbation import Perturbation
from guidance.policy import Filled, Policy
from guidance.rule import Guided, Rows, Rule, stack
from guidance.seg import SEG
from guidance.skip_tuning import SkipTuning
from guidance.slg import SLG
from guidance.step_cache import StepCache
from guidance.tcfg import TCFG
from guidance.unguided import Unguided

if TYPE_CHECKING:
    from guidance.parts import PARTS, Part
    from guidance.registry import CLASSIFIERS, PERTURBATIONS, POLICIES, RULES, STEP_CACHES

__all__ = [
    "APG",
    "CFG",
    "CLASSIFIERS",
    "EMPTY",
    "NAG",
    "NEGATIVE",
    "PAG",
    "PARTS",
    "PERTURBATIONS",
    "POLICIES",
    "RULES",
    "SEG",
    "SLG",
    "STEP_CACHES",
    "TCFG",
    "Adaptive",
    "Always",
    "Autoguidance",
    "Branch",
    "CFGNorm",
    "CFGPlusPlus",
    "CFGRescale",
    "CFGZeroStar",
    "ClassifierGuidance",
    "Composed",
    "DiffusionLevels",
    "DynamicThresholding",
    "EasyCache",
    "Edit",
    "EluCD",
    "FeynmanKac",
    "Filled",
    "FreeU",
    "FrequencyDecoupled",
    "GradientFree",
    "GradientGuidance",
    "Guided",
    "Interval",
    "MagnitudeAware",
    "Minority",
    "NegToMe",
    "NetworkChange",
    "Part",
    "PerpNeg",
    "Perturbation",
    "Policy",
    "Reference",
    "ReferenceGuidance",
    "Rows",
    "Rule",
    "SkipTuning",
    "StepCache",
    "Unguided",
    "WeightedPrompt",
    "guide",
    "invert",
    "stack",
]

# These load the rules, policies and terms of installed packages, which import the names above.
_LATER = {
    **dict.fromkeys(
        ("CLASSIFIERS", "PERTURBATIONS", "POLICIES", "RULES", "STEP_CACHES"), "guidance.registry"
    ),
    **dict.fromkeys(("PARTS", "Part"), "guidance.parts"),
}


def __getattr__(name: str) -> Any:
    """Names that are imported when they are first used, not with the package."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)

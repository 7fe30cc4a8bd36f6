"""Guidance: rules, policies, perturbations and classifiers' terms, usable without the server."""

from guidance.branch import EMPTY, NEGATIVE, Branch
from guidance.classifier_guidance import (
    ClassifierGuidance,
    GradientGuidance,
    Reference,
    ReferenceGuidance,
)
from guidance.diffusion_levels import DiffusionLevels
from guidance.edits import Edit
from guidance.feynman_kac import FeynmanKac
from guidance.inversion import invert
from guidance.loop import guide
from guidance.nag import NAG
from guidance.negtome import NegToMe
from guidance.perturbation import Perturbation
from guidance.policy import Filled, Policy
from guidance.rule import Guided, Rows, Rule, stack
from guidance.skip_tuning import SkipTuning

# isort: split
# Last, as the rules, policies and terms of installed packages import the names above.
from guidance.registry import CLASSIFIERS, PERTURBATIONS, POLICIES, RULES

# isort: split
from guidance.parts import PARTS, Part

# isort: split
from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.apg import APG
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.cfg_norm import CFGNorm
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.cfg_rescale import CFGRescale
from guidance.cfg_zero_star import CFGZeroStar
from guidance.composed import Composed, WeightedPrompt
from guidance.dynamic_thresholding import DynamicThresholding
from guidance.elucd import EluCD
from guidance.frequency_decoupled import FrequencyDecoupled
from guidance.gradient_free import GradientFree
from guidance.interval import Interval
from guidance.magnitude_aware import MagnitudeAware
from guidance.minority import Minority
from guidance.pag import PAG
from guidance.perp_neg import PerpNeg
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.tcfg import TCFG
from guidance.unguided import Unguided

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
    "Edit",
    "EluCD",
    "FeynmanKac",
    "Filled",
    "FrequencyDecoupled",
    "GradientFree",
    "GradientGuidance",
    "Guided",
    "Interval",
    "MagnitudeAware",
    "Minority",
    "NegToMe",
    "Part",
    "PerpNeg",
    "Perturbation",
    "Policy",
    "Reference",
    "ReferenceGuidance",
    "Rows",
    "Rule",
    "SkipTuning",
    "Unguided",
    "WeightedPrompt",
    "guide",
    "invert",
    "stack",
]

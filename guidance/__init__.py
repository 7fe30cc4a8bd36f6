"""Guidance rules, policies and perturbations: pure mathematics, usable without the server."""

from guidance.branch import EMPTY, NEGATIVE, Branch
from guidance.edits import Edit
from guidance.perturbation import Perturbation
from guidance.policy import Filled, Policy
from guidance.registry import PERTURBATIONS, POLICIES, RULES
from guidance.rule import Guided, Rows, Rule, stack
from guidance.skip_tuning import SkipTuning

__all__ = [
    "EMPTY",
    "NEGATIVE",
    "PERTURBATIONS",
    "POLICIES",
    "RULES",
    "Branch",
    "Edit",
    "Filled",
    "Guided",
    "Perturbation",
    "Policy",
    "Rows",
    "Rule",
    "SkipTuning",
    "stack",
]

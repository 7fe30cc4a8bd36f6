"""Guidance rules and policies: pure mathematics, usable without the server."""

from guidance.policy import Policy
from guidance.registry import POLICIES, RULES
from guidance.rule import Guided, Rows, Rule, stack

__all__ = ["POLICIES", "RULES", "Guided", "Policy", "Rows", "Rule", "stack"]

"""What a model is sampled with by a request that leaves it out, where its family knows better."""

from __future__ import annotations

from dataclasses import dataclass

from guidance.policy import Policy
from guidance.rule import Rule
from samplers import Sampler, Spacing

__all__ = ["ModelDefaults"]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """The settings that a model was distilled for.

    A family's file decides them from the configs of a model folder. Models without any take the
    server's defaults.

    Attributes:
        sampler: how the noise is removed.
        spacing: of that sampler's steps, and of other samplers whose own has the same name.
        steps: number of sampler steps.
        rule: of guidance.
        policy: of guidance.
    """

    sampler: Sampler
    spacing: Spacing
    steps: int
    rule: Rule
    policy: Policy

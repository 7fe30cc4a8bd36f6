"""A model's own sampling defaults, for requests that leave the settings out."""

from __future__ import annotations

from dataclasses import dataclass

from guidance.cfg_norm import CFGNorm
from guidance.policy import Policy
from guidance.rule import Rule
from samplers import PredictionType, Sampler, Spacing, Trailing

__all__ = ["ModelDefaults"]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """The settings that a model was distilled for.

    A family's module derives them from the configs of a model folder, or the operator states them
    in the folder. Models without any use the server's defaults.

    Attributes:
        sampler: the sampler.
        spacing: spacing for this sampler, and for others whose own spacing has the same name.
        steps: number of sampler steps.
        rule: guidance rule.
        policy: guidance policy.
        convention: name of these settings in ``CONVENTIONS``.
        reason: why the model is known to follow the convention, as a clause.
        cfg_norm: norm rescaling of guidance; None for none.
        counts: numbers of steps that the model was distilled for; empty for any number.
        prediction: prediction type of the network, where the scheduler's config cannot state it.
    """

    sampler: Sampler
    spacing: Spacing
    steps: int
    rule: Rule
    policy: Policy
    convention: str
    reason: str
    cfg_norm: CFGNorm | None = None
    counts: tuple[int, ...] = ()
    prediction: PredictionType | None = None

    def spacing_of(self, steps: int | None) -> Spacing:
        """The spacing for a run of the model's sampler.

        Args:
            steps: number of steps of the request; None for the model's own. A spacing that lists
                times for one number of steps is replaced by ``trailing`` for any other.
        """
        if steps is None or self.spacing.own_steps in (None, steps):
            return self.spacing
        return Trailing()

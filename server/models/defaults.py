"""What a model is sampled with by a request that leaves it out, where its family knows better."""

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

    A family's file decides them from the configs of a model folder, or the operator names them
    there. Models without any take the server's defaults.

    Attributes:
        sampler: how the noise is removed.
        spacing: of that sampler's steps, and of other samplers whose own has the same name.
        steps: number of sampler steps.
        rule: of guidance.
        policy: of guidance.
        convention: name of the convention that these settings are, in ``CONVENTIONS``.
        reason: how it is known that the model follows it, as a clause.
        cfg_norm: of guidance; None for none.
        counts: the numbers of steps that the model was distilled for; empty for any number.
        prediction: what the network puts out, where the scheduler's config cannot say.
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
        """The spacing of a run of the model's sampler.

        Args:
            steps: of the request; None for the model's own number. Times that are listed for one
                number of steps are left for ``trailing`` at another.
        """
        if steps is None or self.spacing.own_steps in (None, steps):
            return self.spacing
        return Trailing()

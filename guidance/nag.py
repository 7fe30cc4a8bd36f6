"""Normalized attention guidance: away from the negative prompt, inside the cross-attention."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from guidance.edits import NormalizedAttention
from guidance.window import Window


class NAG(Window, frozen=True):
    """Normalized attention guidance (Chen et al., arXiv 2505.21179).

    In every cross-attention of the prompt's own prediction, the same queries attend to the prompt,
    which gives Z+, and to the negative prompt, which gives Z-. The extrapolation
    ``Z~ = scale Z+ - (scale - 1) Z-`` is scaled down where its L1 norm, token by token, exceeds
    ``tau`` times that of Z+, and blended: ``alpha Z~ + (1 - alpha) Z+``.

    It costs no evaluation. It gives a negative prompt to models that are sampled in few steps
    without guidance, for which extrapolating predictions fails. Combined with a rule it acts only
    in the prompt's prediction, as in the authors' pipelines; the predictions of the rule's branches
    and of perturbations are unchanged.

    ``scale``, ``tau`` and ``alpha`` are the authors' ``nag_scale``, ``nag_tau`` and ``nag_alpha``,
    and their defaults those for few-step SDXL. The authors' ``nag_end`` is a fraction of the
    training times, whereas ``stop`` is a fraction of the steps.
    """

    summary: ClassVar[str] = (
        "Steers away from the negative prompt inside the cross-attention, without extra "
        "evaluations."
    )
    source: ClassVar[str] = "Chen et al., arXiv 2505.21179."
    reads_negative_prompt: ClassVar[bool] = True
    scale: float = Field(
        default=3.0,
        ge=1,
        le=50,
        description="How far attention is extrapolated; 1 is plain attention.",
    )
    tau: float = Field(
        default=2.5,
        gt=0,
        le=100,
        description="Maximum L1 norm of a token, as a multiple of its norm without guidance.",
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the guided attention; 0 is plain attention."
    )

    @property
    def edit(self) -> NormalizedAttention:
        """The change made inside the network."""
        return NormalizedAttention(self.scale, self.tau, self.alpha)

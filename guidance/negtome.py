"""Negative token merging: images of one request that keep away from each other."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from guidance.edits import ApartFrom
from guidance.perturbation import Layers  # noqa: TC001 - a field's type
from guidance.window import Window


class NegToMe(Window, frozen=True):
    """Negative token merging (Singh et al., arXiv 2412.01339).

    In the attention of some layers each token h of an image moves away from the token of the
    reference that is most like it, if that is like enough: ``h + strength (h - h_ref)``. The
    reference is the request's first image, which stays what it would be alone; every prediction
    of an image (for the prompt, for the negative prompt, ...) has that image's same prediction as
    its reference. Costs no evaluation.

    The defaults are the authors' for SDXL, whose window is a fifth of the training times.

    Departures: where the authors' code looks for the most similar image token of each reference
    token, and then takes the two indices for each other, this does as the paper says. Layers are
    named, not chosen by their resolution.
    """

    summary: ClassVar[str] = "Drives the images of a request apart from its first, for diversity."
    source: ClassVar[str] = "Singh et al., arXiv 2412.01339."
    strength: float = Field(default=0.9, gt=0, le=10, description="How far tokens are pushed.")
    threshold: float = Field(
        default=0.7, ge=-1, lt=1, description="Cosine above which two tokens are alike."
    )
    layers: Layers = ("up_blocks",)
    stop: float = Field(
        default=0.2, gt=0, le=1, description="Share of the steps done when it closes."
    )

    @property
    def edit(self) -> ApartFrom:
        """What is changed inside the network, but for the row that is the reference."""
        return ApartFrom(self.layers, self.strength, self.threshold)

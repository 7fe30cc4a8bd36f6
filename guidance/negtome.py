"""Negative token merging: images that keep away from another one, or from a picture."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from guidance.edits import ApartFrom
from guidance.perturbation import Layers  # noqa: TC001 - a field's type
from guidance.window import Window


class NegToMe(Window, frozen=True):
    """Negative token merging (Singh et al., arXiv 2412.01339).

    In the attention of some layers each token h of an image moves away from the token of the
    reference that is most like it, if that is like enough: ``h + strength (h - h_ref)``.

    The reference is the request's first image, which stays what it would be alone; every prediction
    of an image (for the prompt, for the negative prompt, ...) has that image's same prediction as
    its reference. This costs no evaluation.

    Or it is a picture r that the request supplies, and then no image stays what it would be alone.
    At each stage in the window every image takes ``alpha r + sigma eps``, told the prompt, through
    the network beside its own predictions, and all of these have it as their reference. This costs
    an evaluation at each such stage. eps is the noise that the image itself starts from.

    The defaults are the authors' for SDXL, whose window is a fifth of the training times.

    Departures: where the authors' code looks for the most similar image token of each reference
    token, and then takes the two indices for each other, this does as the paper says. Layers are
    named, not chosen by their resolution. Of a picture, the authors' code draws new noise at each
    step, and evaluates it for the negative prompt too, where the predictions for that have their
    reference; it may be masked.
    """

    summary: ClassVar[str] = "Pushes images away from the first one, or from a reference image."
    source: ClassVar[str] = "Singh et al., arXiv 2412.01339."
    away_from: Literal["first", "reference"] | None = Field(
        default=None,
        description=(
            "The request's first image, or the image sent as `reference`; by default the latter "
            "if one is sent."
        ),
    )
    strength: float = Field(default=0.9, gt=0, le=10, description="How far tokens are pushed.")
    threshold: float = Field(
        default=0.7, ge=-1, lt=1, description="Cosine above which two tokens count as similar."
    )
    layers: Layers = ("up_blocks",)
    stop: float = Field(
        default=0.2, gt=0, le=1, description="Fraction of the steps after which it stops acting."
    )

    @property
    def edit(self) -> ApartFrom:
        """What is changed inside the network, but for the row that is the reference."""
        return ApartFrom(self.layers, self.strength, self.threshold)

"""Negative token merging: pushing images away from another image or from a picture."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from guidance.edits import ApartFrom
from guidance.perturbation import Layers  # noqa: TC001 - a field's type
from guidance.window import Window


class NegToMe(Window, frozen=True):
    """Negative token merging (Singh et al., arXiv 2412.01339).

    In the attention of some layers, each token h of an image moves away from the most similar token
    of the reference, if the similarity exceeds a threshold: ``h + strength (h - h_ref)``.

    The reference is the request's first image, which itself is not changed. Every prediction of an
    image (for the prompt, for the negative prompt, ...) has the same prediction of the first image
    as its reference. This costs no evaluation.

    Alternatively the reference is a picture r supplied with the request, and then all images are
    changed. At each stage in the window, every image evaluates ``alpha r + sigma eps`` with the
    prompt in addition to its own predictions, and all of these have it as their reference. This
    costs one evaluation at each such stage. eps is the noise that the image itself starts from.

    The defaults are the authors' for SDXL, whose window is a fifth of the training times.

    Departures from the authors' code: it finds the most similar image token of each reference token
    and then confuses the two indices; this follows the paper. Layers are named, not chosen by their
    resolution. For a picture, the authors' code draws new noise at each step, also evaluates the
    picture for the negative prompt, as the reference of those predictions, and supports a mask.
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
        """The change made inside the network, except for the row that is the reference."""
        return ApartFrom(self.layers, self.strength, self.threshold)

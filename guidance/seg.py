"""Smoothed energy guidance."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.edits import BlurredQueries
from guidance.perturbation import Layers, Perturbation

if TYPE_CHECKING:
    from guidance.edits import Edit


class SEG(Perturbation, frozen=True):
    """Smoothed energy guidance (Hong, arXiv 2408.00760, section 4).

    In the perturbed network, the queries of self-attention are blurred over the picture, which
    smooths the energy that attention minimises. Its effect is weaker than that of ``pag`` at the
    same scale.

    The blur is that of the authors' code: a Gaussian that is cut off at three sigma, or at half a
    side if that is less, with mirrored borders. Their pictures are square; here each side has its
    own kernel.
    """

    summary: ClassVar[str] = "Steers away from a prediction with blurred self-attention."
    source: ClassVar[str] = "Hong, arXiv 2408.00760, section 4."
    name: Literal["seg"] = "seg"
    sigma: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description=(
            "Width of the blur in cells of the layer; null is infinite, the mean over all cells."
        ),
    )
    layers: Layers = ("middle",)

    @property
    @override
    def edit(self) -> Edit:
        return BlurredQueries(self.layers, inf if self.sigma is None else self.sigma)

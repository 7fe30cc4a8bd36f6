"""Skip-layer guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.edits import SkippedBlocks
from guidance.perturbation import Layers, Perturbation

if TYPE_CHECKING:
    from guidance.edits import Edit


class SLG(Perturbation, frozen=True):
    """Skip-layer guidance, as published with Stable Diffusion 3.5 medium.

    The perturbed network skips some transformer blocks. It acts early in a run, where the structure
    forms. For Stable Diffusion 3.5 medium its authors skip the blocks 7, 8 and 9.
    """

    summary: ClassVar[str] = "Steers away from a prediction without some transformer blocks."
    source: ClassVar[str] = "Stability AI, reference code of Stable Diffusion 3.5 medium."
    name: Literal["slg"] = "slg"
    scale: float = Field(default=2.8, ge=0, le=100, description="Strength; 0 has no effect.")
    start: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Fraction of the steps after which it starts to act.",
    )
    stop: float = Field(
        default=0.2, gt=0, le=1, description="Fraction of the steps after which it stops acting."
    )
    layers: Layers = ("middle",)

    @property
    @override
    def edit(self) -> Edit:
        return SkippedBlocks(self.layers)

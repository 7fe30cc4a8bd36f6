"""Skip-tuning: attenuation of a U-Net's skip connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from guidance.edits import SkipScales
from guidance.network_change import NetworkChange

if TYPE_CHECKING:
    from guidance.edits import Edit


class SkipTuning(NetworkChange, frozen=True):
    """Skip-tuning (Ma et al., arXiv 2402.15170): factors on a U-Net's skip connections.

    The factors change linearly from the bottom connection to the top one, and act in every
    prediction of the image. Costs nothing; helps most with few steps.
    """

    summary: ClassVar[str] = "Scales a U-Net's skip connections; sharper at few steps, at no cost."
    source: ClassVar[str] = "Ma et al., arXiv 2402.15170."
    bottom: float = Field(
        default=0.8, ge=0, le=2, description="Factor on the lowest connection; 1 changes nothing."
    )
    top: float = Field(
        default=1.0,
        ge=0,
        le=2,
        description="Factor on the highest connection; 1 changes nothing.",
    )

    @property
    @override
    def edit(self) -> Edit:
        return SkipScales((self.bottom, self.top))

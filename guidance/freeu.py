"""FreeU: amplify a U-Net's backbone and attenuate the coarse part of its skip connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from guidance.edits import BackboneScales
from guidance.network_change import NetworkChange

if TYPE_CHECKING:
    from guidance.edits import Edit


class FreeU(NetworkChange, frozen=True):
    """FreeU (Si et al., arXiv 2309.11497), with the factors and the stages of diffusers.

    In the two lowest up-sampling stages of a U-Net, half of the channels of the backbone are scaled
    by ``b``, and the four lowest frequencies of the skip connections by ``s``. Acts in every
    prediction of the image. The defaults are those that diffusers recommends for Stable Diffusion
    XL; for 1.5 it recommends 1.5 and 1.6 for ``b1`` and ``b2``.

    The authors' code and ComfyUI's choose the stages by their number of channels instead, which in
    Stable Diffusion 1.5 includes higher stages.
    """

    summary: ClassVar[str] = "More of a U-Net's backbone, less of its coarse skip connections."
    source: ClassVar[str] = "Si et al., arXiv 2309.11497; diffusers, enable_freeu."
    b1: float = Field(
        default=1.3, ge=0, le=2, description="Factor on the backbone in the lowest stage; 1 is off."
    )
    b2: float = Field(
        default=1.4, ge=0, le=2, description="The same in the stage above the lowest."
    )
    s1: float = Field(
        default=0.9,
        ge=0,
        le=2,
        description="Factor on coarse skip connections in the lowest stage; 1 is off.",
    )
    s2: float = Field(
        default=0.2, ge=0, le=2, description="The same in the stage above the lowest."
    )

    @property
    @override
    def edit(self) -> Edit:
        return BackboneScales((self.b1, self.b2), (self.s1, self.s2))

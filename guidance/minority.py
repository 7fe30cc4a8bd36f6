"""Minority guidance: towards rare pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.classifier_guidance import GradientGuidance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ATTRIBUTE = "minority"
"""The classifier's attribute for how rare a picture is."""


class Minority(GradientGuidance, frozen=True):
    """Minority guidance (Um et al., arXiv 2301.12334, section 3.3).

    ``eps -= sigma k grad_x log p(m | x)`` with a classifier of noisy pictures. Its classes are the
    tenths of the training pictures ordered by how badly the model restores them from noise: rare
    pictures are restored as more common ones.
    """

    summary: ClassVar[str] = "Steers towards rare images, which a model otherwise seldom makes."
    source: ClassVar[str] = "Um et al., arXiv 2301.12334, section 3.3."
    name: Literal["minority"] = "minority"
    scale: float = Field(default=3.5, ge=0, le=100, description="Strength k; 0 has no effect.")
    tenth: int = Field(
        default=10,
        ge=1,
        le=10,
        description="Tenth of the training images to steer towards; 10 is the rarest.",
    )

    @property
    @override
    def aims(self) -> Mapping[str, str]:
        return {ATTRIBUTE: f"tenth {self.tenth}"}

    @classmethod
    @override
    def objective(
        cls,
        logits: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        del parameters
        return logits[ATTRIBUTE].log_softmax(1).gather(1, targets[ATTRIBUTE][:, None])[:, 0]

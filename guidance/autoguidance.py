"""Autoguidance: guidance away from the prediction of a weaker model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.edits import WeakModel
from guidance.perturbation import Perturbation

if TYPE_CHECKING:
    from guidance.edits import Edit


class Autoguidance(Perturbation, frozen=True):
    """Autoguidance (Karras et al., arXiv 2406.02507, equation 3).

    The other prediction is that of a smaller or less trained model with the same prompt. The
    paper's ``w`` is 1 + ``scale``. Requires a model that comes with such a companion model.
    """

    summary: ClassVar[str] = (
        "Steers away from a weaker model: better images without loss of variety."
    )
    source: ClassVar[str] = "Karras et al., arXiv 2406.02507, equation 3."
    name: Literal["autoguidance"] = "autoguidance"
    scale: float = Field(default=1.0, ge=0, le=100, description="Strength; 0 has no effect.")

    @property
    @override
    def edit(self) -> Edit:
        return WeakModel()

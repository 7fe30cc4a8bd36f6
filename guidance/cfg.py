"""Classifier-free guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.branch import NEGATIVE
from guidance.rule import Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from guidance.branch import Branch


class CFG(Rule, frozen=True):
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, equation 6).

    ``D = Dc + (scale - 1) (Dc - Du)``. Linear in the difference, so the denoised space gives the
    same as the noise space.
    """

    summary: ClassVar[str] = "Classifier-free guidance: away from the negative prompt."
    source: ClassVar[str] = "Ho and Salimans, arXiv 2207.12598, equation 6."
    name: Literal["cfg"] = "cfg"
    scale: float = Field(default=4.0, ge=0, le=100, description="Strength; 1 is no guidance.")

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (NEGATIVE,)

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        push = (parameters["scale"] - 1) * (rows.cond - rows.other)
        return Guided(rows.cond + push, rows.x, rows.memory)

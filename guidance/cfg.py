"""Classifier-free guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from guidance.rule import Guided, Rows, ScaledRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class CFG(ScaledRule, frozen=True):
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, equation 6).

    ``D = Dc + (scale - 1) (Dc - Du)``, where Dc is the denoised prediction for the prompt and Du
    the unconditional one. Linear in the difference, so the result is the same in denoised space
    and in noise space.
    """

    summary: ClassVar[str] = "Classifier-free guidance: away from the negative prompt."
    source: ClassVar[str] = "Ho and Salimans, arXiv 2207.12598, equation 6."
    plain_cfg: ClassVar[bool] = True
    name: Literal["cfg"] = "cfg"

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        push = (parameters["scale"] - 1) * (rows.cond - rows.other)
        return Guided(rows.cond + push, rows.x, rows.memory)

"""Negative prompts without what they share with the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.branch import EMPTY, NEGATIVE
from guidance.reductions import inner
from guidance.rule import Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from guidance.branch import Branch


class PerpNeg(Rule, frozen=True):
    """Perp-Neg (Armandpour et al., arXiv 2304.04968).

    Let p and n be the differences of the prompt's and of the negative prompt's prediction from that
    of the empty prompt, De. Only the component of n orthogonal to p is subtracted:
    ``D = De + scale (p - negative (n - <n, p> / |p|^2 p))``, per row. Three evaluations a stage. It
    uses only differences, so the result is the same in any space.
    """

    summary: ClassVar[str] = (
        "A negative prompt without what it shares with the prompt; three evaluations."
    )
    source: ClassVar[str] = "Armandpour et al., arXiv 2304.04968."
    name: Literal["perp_neg"] = "perp_neg"
    scale: float = Field(default=4.0, ge=0, le=100, description="Strength; 0 is the empty prompt.")
    negative: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="Weight of the negative prompt; 0 is CFG from the empty prompt.",
    )

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        if self.scale * self.negative:
            return (EMPTY, NEGATIVE)
        return () if self.scale == 1 else (EMPTY,)

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        scale, empty = parameters["scale"], rows.others[:, 0]
        p = rows.cond - empty
        guided = rows.cond + (scale - 1) * p
        if rows.others.shape[1] > 1:
            n = rows.others[:, 1] - empty
            squared = inner(p, p)
            share = (inner(n, p) / squared).where(squared > 0, 0)
            across = (n.double() - share * p.double()).to(p.dtype)
            guided = guided - scale * parameters["negative"] * across
        return Guided(guided, rows.x, rows.memory)

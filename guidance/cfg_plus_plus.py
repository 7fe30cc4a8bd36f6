"""CFG++: guidance by interpolation, with unconditional renoising."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.rule import Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class CFGPlusPlus(Rule, frozen=True):
    """CFG++ (Chung et al., arXiv 2406.08070, algorithm 2), for any sampler.

    ``D = Du + scale (Dc - Du)``, renoised with the unconditional noise. A standard step infers
    exactly that noise from the moved point ``x + alpha (D - Du)``, so it suffices to move x; with
    DDIM and Euler this is exactly the published step. In a multistep sampler the history holds D,
    where the authors' code keeps Du.

    With a sampler that evaluates several times in a step, x is moved once, before the first
    evaluation. The other evaluations of the step are at points derived from the moved one: their
    noise relative to D is already the unconditional one, and a second move would count the guidance
    twice.
    """

    summary: ClassVar[str] = (
        "Interpolates with a weight in [0, 1] and renoises unconditionally; invertible."
    )
    source: ClassVar[str] = "Chung et al., arXiv 2406.08070, algorithm 2."
    name: Literal["cfg_plus_plus"] = "cfg_plus_plus"
    scale: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="Weight of the prompt: 0 is unconditional, 1 is conditional.",
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        push = parameters["scale"] * (rows.cond - rows.other)
        moved = (rows.x + rows.alpha * push).where(rows.opens_step, rows.x)
        return Guided(rows.other + push, moved, rows.memory)

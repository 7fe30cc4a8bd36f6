"""Classifier-free guidance that grows over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance import CFG, NEGATIVE, Branch, Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class ScheduledCFG(Rule, frozen=True):
    """Classifier-free guidance whose scale rises over the run (Wang et al., arXiv 2404.13040).

    ``w = 1 + (scale - 1) (power + 1) progress^power``: 1 at the start, and ``scale`` on average.
    Power 1 is the paper's linear schedule; power 0 is CFG.
    """

    summary: ClassVar[str] = "Classifier-free guidance that is weak at first and strong at the end."
    source: ClassVar[str] = "Wang et al., arXiv 2404.13040."
    name: Literal["scheduled_cfg"] = "scheduled_cfg"
    scale: float = Field(
        default=4.0, ge=0, le=100, description="Mean strength over the run; 1 is no guidance."
    )
    power: float = Field(
        default=1.0, ge=0, le=8, description="How late the strength comes; 0 is constant, as CFG."
    )

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (NEGATIVE,)

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        power = parameters["power"]
        # Each row has its own parameters and its own progress; all of them are [rows, 1, 1, 1].
        scale = 1 + (parameters["scale"] - 1) * (power + 1) * rows.progress**power
        return CFG.combine(rows, {"scale": scale})

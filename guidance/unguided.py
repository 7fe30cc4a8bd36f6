"""No guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from guidance.rule import Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from guidance.branch import Branch


class Unguided(Rule, frozen=True):
    """The prompt's prediction unchanged: one evaluation a stage, for distilled models."""

    summary: ClassVar[str] = "No guidance: the prompt's prediction as it is, at half the cost."
    source: ClassVar[str] = "Conditional sampling without guidance."
    combines: ClassVar[bool] = False
    name: Literal["none"] = "none"

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return ()

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond, rows.x, rows.memory)

"""Normalized attention guidance: the prompt's row also attends to the negative prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from guidance.nag import NAG
from server.engine.terms.term import Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from guidance import Edit
    from server.engine.terms.seen import ForwardRows, ImageRows, TermContext
    from server.engine.terms.term import Run


@dataclass(frozen=True, slots=True, eq=False)
class NAGTerm(Term):
    """Changes the cross-attention of the prompt's own prediction.

    Attributes:
        edit: change inside the network.
        negative: text to lead attention away from; the empty prompt if the request has none.
        window: whether the term acts at each stage.
    """

    made_from: ClassVar = NAG
    prepares: ClassVar = True
    edit: Edit
    negative: str
    window: tuple[bool, ...]

    @classmethod
    @override
    def of(cls, setting: NAG, run: Run) -> Self:
        acts = setting.contains(run.plan.noise_ratio, run.plan.progress)
        changes = setting.scale != 1 and setting.alpha != 0
        return cls(setting.edit, run.negative_prompt or "", tuple((acts & changes).tolist()))

    @override
    def acts(self, stage: int) -> bool:
        return self.window[stage]

    @property
    @override
    def texts(self) -> tuple[str | None, ...]:
        return (self.negative,)

    @classmethod
    @override
    def prepare(
        cls,
        terms: Sequence[Self],
        forward: ForwardRows,
        own: Sequence[ImageRows],
        seen: TermContext,
    ) -> None:
        rows = [places.image[0] for places in own]
        negatives = [
            of(term.negative) for of, term in zip(seen.conditioning_for, terms, strict=True)
        ]
        away = seen.lane.model.stack(negatives, fixed=seen.fixed_rows is not None)
        forward.lead_away(seen.lane.indices(rows), away)
        for row, term in zip(rows, terms, strict=True):
            forward.edit(row, term.edit)

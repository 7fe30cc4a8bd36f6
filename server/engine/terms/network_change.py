"""Changes inside the network for all predictions of an image: skip-tuning and FreeU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from guidance.network_change import NetworkChange
from server.engine.terms.term import Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from guidance import Edit
    from server.engine.terms.seen import ForwardRows, ImageRows, TermContext
    from server.engine.terms.term import Run


@dataclass(frozen=True, slots=True, eq=False)
class NetworkChangeTerm(Term):
    """Applies the same change to all rows of an image, at every stage.

    Attributes:
        edit: change for each row.
    """

    made_from: ClassVar = NetworkChange
    prepares: ClassVar = True
    edit: Edit

    @classmethod
    @override
    def of(cls, setting: NetworkChange, run: Run) -> Self:
        return cls(setting.edit)

    @override
    def acts(self, stage: int) -> bool:
        return True

    @classmethod
    @override
    def prepare(
        cls,
        terms: Sequence[Self],
        forward: ForwardRows,
        own: Sequence[ImageRows],
        seen: TermContext,
    ) -> None:
        for term, rows in zip(terms, own, strict=True):
            for row in rows.image.values():
                forward.edit(row, term.edit)

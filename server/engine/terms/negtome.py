"""Negative token merging: rows move away from those of a picture, or of their group's first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from typing_extensions import override

from guidance.negtome import NegToMe
from server.engine.terms.term import RowSpec, Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from guidance.edits import ApartFrom
    from server.engine.terms.seen import ForwardRows, ImageRows, TermContext
    from server.engine.terms.term import Run


class AvoidedLatents(NamedTuple):
    """A picture to move away from: its latents, and the noise that is added to them, [C, h, w]."""

    latents: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NegToMeTerm(Term):
    """Changes the rows of an image so that they move away from another row.

    With a picture, the image requests one more row, which is evaluated at the picture with the
    image's own noise; all other rows of the image move away from it. Without one, the predictions
    of all images of a group but the first move away from the same prediction of the first.

    Attributes:
        edit: change inside the network, without the row to move away from.
        window: whether the term acts at each stage.
        row: text of the picture's row.
        avoided: picture to move away from; None for the group's first image.
    """

    made_from: ClassVar = NegToMe
    prepares: ClassVar = True
    edit: ApartFrom
    window: tuple[bool, ...]
    row: RowSpec
    avoided: Tensor | None = None

    @classmethod
    @override
    def of(cls, setting: NegToMe, run: Run) -> Self:
        window = setting.contains(run.plan.noise_ratio, run.plan.progress)
        return cls(setting.edit, tuple(window.tolist()), RowSpec(run.prompt), run.reference)

    @override
    def acts(self, stage: int) -> bool:
        return self.window[stage]

    @override
    def rows(self, stage: int) -> tuple[RowSpec, ...]:
        return () if self.avoided is None else (self.row,)

    @property
    @override
    def picture(self) -> Tensor | None:
        return self.avoided

    @override
    def begin(self, latents: Tensor | None, noise: Tensor) -> Any:
        return None if latents is None else AvoidedLatents(latents, noise)

    @classmethod
    @override
    def prepare(
        cls,
        terms: Sequence[Self],
        forward: ForwardRows,
        own: Sequence[ImageRows],
        seen: TermContext,
    ) -> None:
        for members in seen.groups:
            first, *others = members
            if seen.states[first] is None:
                for i in others:
                    for number, row in own[i].image.items():
                        away = replace(terms[i].edit, reference=own[first].image[number])
                        forward.edit(row, away)
                continue
            for i in members:
                terms[i]._show(seen.states[i], forward, own[i], seen.alpha[i], seen.sigma[i])

    def _show(
        self,
        shown: AvoidedLatents,
        forward: ForwardRows,
        own: ImageRows,
        alpha: float,
        sigma: float,
    ) -> None:
        """Put the picture in its row, and make the image's other rows move away from it."""
        [place] = own.term
        forward.x[place] = alpha * shown.latents + sigma * shown.noise
        for row in own.image.values():
            if row != place:
                forward.edit(row, replace(self.edit, reference=place))

"""Perturbations: guidance away from the prediction of a perturbed network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from guidance.perturbation import Perturbation
from server.engine.terms.term import RowSpec, Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from server.engine.terms.seen import Predictions, TermContext
    from server.engine.terms.term import Run


@dataclass(frozen=True, slots=True, eq=False)
class PerturbationTerm(Term):
    """``D + strength (Dc - Dp)``, with one row for Dp at each stage in the window.

    Attributes:
        row: perturbed prediction.
        strengths: strength at each stage; 0 where the term does not act.
    """

    made_from: ClassVar = Perturbation
    applies: ClassVar = True
    row: RowSpec
    strengths: tuple[float, ...]

    @classmethod
    @override
    def of(cls, setting: Perturbation, run: Run) -> Self:
        acts = setting.evaluates(run.plan.noise_ratio, run.plan.progress)
        strengths = acts * setting.strengths(run.levels())
        return cls(RowSpec(run.prompt, (setting.edit,)), tuple(strengths.tolist()))

    @override
    def acts(self, stage: int) -> bool:
        return self.strengths[stage] != 0

    @override
    def rows(self, stage: int) -> tuple[RowSpec, ...]:
        return (self.row,)

    @classmethod
    @override
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: TermContext
    ) -> Tensor:
        strengths = [term.strengths[at] for term, at in zip(terms, seen.stages, strict=True)]
        return denoised + seen.factors(strengths) * (predictions.cond() - predictions.own())

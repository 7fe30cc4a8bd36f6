"""CFG norm: rescales guided predictions to the length of the prompts' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from guidance.cfg_norm import CFGNorm
from server.engine.terms.term import Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from server.engine.terms.seen import Predictions, TermContext
    from server.engine.terms.term import Run


@dataclass(frozen=True, slots=True, eq=False)
class CFGNormTerm(Term):
    """Rescales the output of the rule and earlier terms, at the stages in the window.

    Attributes:
        norm: settings of the rescaling.
        window: whether the term acts at each stage.
    """

    made_from: ClassVar = CFGNorm
    applies: ClassVar = True
    norm: CFGNorm
    window: tuple[bool, ...]

    @classmethod
    @override
    def of(cls, setting: CFGNorm, run: Run) -> Self:
        window = setting.contains(run.plan.noise_ratio, run.plan.progress)
        return cls(setting, tuple(window.tolist()))

    @override
    def acts(self, stage: int) -> bool:
        return self.window[stage]

    @classmethod
    @override
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: TermContext
    ) -> Tensor:
        given = predictions.cond(), seen.x, seen.factors(seen.alpha), seen.factors(seen.sigma)
        strengths = seen.factors([term.norm.strength for term in terms])
        kinds = [(term.norm.variant, term.norm.patch) for term in terms]
        found = denoised
        for kind, norm in dict(zip(kinds, (term.norm for term in terms), strict=True)).items():
            # Over all rows, so that a row's bits do not depend on how many share its kind.
            rescaled = norm.rescale(denoised, *given, strengths)
            found = torch.where(seen.factors([own == kind for own in kinds]) > 0, rescaled, found)
        return found

"""Particles: images of a group are weighted after each step, and some take over others' states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from guidance.feynman_kac import FeynmanKac, ancestors, effective, increments
from server.engine.state.noise import stage_uniform
from server.engine.terms.term import Resampled, Term

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from server.engine.terms.seen import Predictions, TermContext
    from server.engine.terms.term import Run


@dataclass(frozen=True, slots=True, eq=False)
class FeynmanKacTerm(Term):
    """Resamples the images of a group by Feynman-Kac weights after every stage but the last.

    It requires the rule ``cfg`` evaluated at every stage, steps of the reverse SDE, and no other
    term. A particle with a non-finite prediction has no weight, so another one takes its place.

    Attributes:
        guidance: settings that turn increments of log-weights into normalized weights.
        scale: guidance scale of the rule.
        snr: ``(alpha / sigma)^2`` at each stage, and inf at the end of the plan.
    """

    made_from: ClassVar = FeynmanKac
    resamples: ClassVar = True
    guidance: FeynmanKac
    scale: float
    snr: tuple[float, ...]

    @classmethod
    @override
    def of(cls, setting: FeynmanKac, run: Run) -> Self:
        snr = np.square(run.plan.alpha[:-1] / run.plan.sigma[:-1])
        return cls(setting, float(getattr(run.rule, "scale", 1.0)), (*snr.tolist(), np.inf))

    @override
    def acts(self, stage: int) -> bool:
        return np.isfinite(self.snr[stage + 1])

    @classmethod
    @override
    def resample(
        cls,
        terms: Sequence[Self],
        sound: Sequence[bool],
        predictions: Predictions,
        seen: TermContext,
    ) -> Resampled:
        cond, other = predictions.cond(), predictions.branch()
        origins, sizes = list(range(len(terms))), [1.0] * len(terms)
        for members in seen.groups:
            lead, stage = members[0], seen.stages[members[0]]
            term, rows = terms[lead], seen.lane.indices(members)
            snr, after = term.snr[stage : stage + 2]
            pair = cond.index_select(0, rows), other.index_select(0, rows)
            gained = np.array(increments(*pair, term.scale, snr, after).tolist())
            gained[[not sound[i] for i in members]] = np.nan
            weights = term.guidance.weights(gained)
            drawn = ancestors(weights, stage_uniform(seen.seeds[lead], stage))
            for i, origin in zip(members, drawn, strict=True):
                origins[i] = members[origin]
                sizes[i] = effective(weights)
        return Resampled(origins, sizes)

"""Linear adaptive guidance: the second prediction as a combination of earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.policy import Filled, Policy, steps_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.rule import Rows

WINDOW = 3
"""Predictions of each branch that an estimate is made of."""

TERMS = 2 * WINDOW
"""Numbers of a stage: for the prompt's predictions, newest first, then the second branch's."""


class LinearAdaptive(Policy, frozen=True):
    """LinearAG (Castillo et al., arXiv 2312.12487, section 5).

    In the first part of a run evaluations of the second branch alternate with estimates of it: a
    sum of the branches' predictions so far, weighted by scalars that were fitted for this stage by
    least squares over stored runs. Afterwards the prompt's prediction is used alone.

    Departures from the paper: denoised predictions are combined, not noise predictions, which is
    as accurate and stays exact at pure noise; and only the last three of each branch, where the
    paper takes all. On the embedded model (25 steps of 2M, cfg at scale 4, 32 unseen runs) the
    error of the estimates is 17.4 % of the difference of the branches, with all of them 16.3 %.
    """

    summary: ClassVar[str] = "Alternates evaluations with fitted estimates, then stops guiding."
    source: ClassVar[str] = "Castillo et al., arXiv 2312.12487, section 5."
    estimates: ClassVar[bool] = True
    fitted: ClassVar[int] = TERMS
    name: Literal["linear_adaptive"] = "linear_adaptive"
    every: int = Field(
        default=2, ge=1, le=100, description="Steps from one evaluation to the next."
    )
    stop: float = Field(
        default=0.5, gt=0, le=1, description="Share of the steps done when guidance ends."
    )

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return (steps_of(progress) % self.every == 0) & (progress < self.stop)

    @override
    def estimated(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return (steps_of(progress) % self.every != 0) & (progress < self.stop)

    @property
    @override
    def memory_slots(self) -> int:
        return TERMS - 1

    @classmethod
    @override
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        from torch import cat

        # Newest first: the prompt's predictions, then the second branch's before this stage.
        known = cat([rows.cond[:, None], memory], 1)
        estimate = (parameters["constants"] * known).sum(1)
        other = rows.other.where(evaluated, estimate)
        kept = [known[:, : WINDOW - 1], other[:, None], known[:, WINDOW:-1]]
        return Filled(other, cat(kept, 1))

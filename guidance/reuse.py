"""Reuse of the last difference of the predictions for some steps."""

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


class Reuse(Policy, frozen=True):
    """Evaluates the branches every few steps and reuses their last differences in between.

    The memory holds ``(Dc - Du) / sigma``, the difference in velocity, which changes least from
    step to step and is finite also at pure noise. On the embedded model (12 images, 25 steps of 2M,
    cfg at scale 4, evaluated every 2 / every 3 steps), the final latents differ from those of full
    guidance by 1.9 / 3.7 %. Alternatives do worse or no better: 2.0 / 3.7 % when reusing the
    difference in noise, 2.4 / 5.0 % that of denoised predictions, 6.4 / 46 % the denoised second
    prediction itself, and 9.6 / 24 % when only the prompt's prediction is used in between.
    """

    summary: ClassVar[str] = "Evaluates the branches every few steps and reuses the difference."
    source: ClassVar[str] = "Measured; the guidance counterpart of feature caching."
    estimates: ClassVar[bool] = True
    name: Literal["reuse"] = "reuse"
    every: int = Field(
        default=2, ge=1, le=100, description="Steps from one evaluation to the next; 1 is always."
    )

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return steps_of(progress) % self.every == 0

    @override
    def memory_slots(self, branches: int) -> int:
        return branches

    @classmethod
    @override
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        cond, sigma, evaluated = rows.cond[:, None], rows.sigma[:, None], evaluated[:, None]
        differences = ((cond - rows.others) / sigma).where(evaluated, memory)
        estimates = cond - sigma * differences
        return Filled(rows.others.where(evaluated, estimates), differences)

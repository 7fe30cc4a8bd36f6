"""Adaptive guidance: stop guiding once both predictions agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from guidance.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.rule import Rows


class Adaptive(Policy, frozen=True):
    """Adaptive guidance (Castillo et al., arXiv 2312.12487, section 4).

    Once the cosine of the two noise predictions reaches the threshold, later stages evaluate the
    prompt alone. The cosine is taken per row, in noise space, in float64; with several branches all
    of them must reach it.
    """

    summary: ClassVar[str] = "Stops guiding when both predictions agree; saves evaluations."
    source: ClassVar[str] = "Castillo et al., arXiv 2312.12487, section 4."
    adapts: ClassVar[bool] = True
    name: Literal["adaptive"] = "adaptive"
    threshold: float = Field(
        default=0.991,
        ge=-1,
        le=1,
        description="Cosine from which guidance ends; higher guides longer.",
    )

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return np.ones(len(noise_ratio), np.bool_)

    @classmethod
    @override
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        # eps = (x - alpha D) / sigma; the cosine does not see the division.
        cond = (rows.x - rows.alpha * rows.cond)[:, None].flatten(2).double()
        others = (rows.x[:, None] - rows.alpha[:, None] * rows.others).flatten(2).double()
        lengths = cond.norm(dim=2) * others.norm(dim=2)
        return ((cond * others).sum(2) >= parameters["threshold"].view(-1, 1) * lengths).all(1)

"""Guidance embedded in a distilled network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from guidance.policy import Policy

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Embedded(Policy, frozen=True):
    """The network is conditioned on the scale of ``cfg`` and guides by itself.

    One evaluation a stage. For networks distilled for it (Meng et al., arXiv 2210.03142; Luo et
    al., arXiv 2310.04378), which embed ``scale - 1`` together with the time. The negative prompt
    has no effect.
    """

    summary: ClassVar[str] = "Passes the scale to a distilled network; no second evaluation."
    source: ClassVar[str] = "Meng et al., arXiv 2210.03142, section 3.1."
    embeds: ClassVar[bool] = True
    name: Literal["embedded"] = "embedded"

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return np.zeros(len(noise_ratio), np.bool_)

"""Residual classifier-free guidance: a second prediction without a network evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from guidance.policy import Filled, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.rule import Rows


class Residual(Policy, frozen=True):
    """Residual classifier-free guidance (Kodaira et al., arXiv 2312.12491, section 3.2).

    The second noise prediction is ``delta (x - alpha r) / sigma``: for ``delta`` 1, the noise that
    turns a reference picture r into x. In denoised form it is ``(1 - delta) x / alpha + delta r``.
    With ``mode`` ``self``, r is the picture that the run starts from; with ``onetime`` it is the
    branch's own denoised prediction at the first stage, the only stage that evaluates it. A rule
    with several branches requires ``onetime``, as one picture would give the same for all of them.

    Departure from the paper: at pure noise, where ``x / alpha`` is infinite, ``delta`` is 1.
    """

    summary: ClassVar[str] = "Guides away from the input image, or from a single evaluation."
    source: ClassVar[str] = "Kodaira et al., arXiv 2312.12491, equations 6 to 8."
    estimates: ClassVar[bool] = True
    without_reference: ClassVar[str | None] = '"mode": "onetime"'
    name: Literal["residual"] = "residual"
    mode: Literal["self", "onetime"] = Field(
        default="self",
        description=(
            "Reference: self is the image that the run starts from, onetime one evaluation at the "
            "first step."
        ),
    )
    delta: float = Field(default=1.0, ge=0, le=2, description="Weight of the reference's noise.")

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return (np.arange(len(noise_ratio)) == 0) & (self.mode == "onetime")

    @property
    @override
    def most_branches(self) -> int | None:
        return 1 if self.mode == "self" else None

    @override
    def memory_slots(self, branches: int) -> int:
        return branches

    @property
    @override
    def wants_reference(self) -> bool:
        return self.mode == "self"

    @classmethod
    @override
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        references = rows.others.where(evaluated[:, None], memory)
        delta, alpha = parameters["delta"][:, None], rows.alpha[:, None]
        virtual = (1 - delta) * rows.x[:, None] / alpha + delta * references
        return Filled(virtual.where(alpha > 0, references), references)

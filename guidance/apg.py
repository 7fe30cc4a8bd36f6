"""Adaptive projected guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.reductions import inner
from guidance.rule import Guided, Rows, ScaledRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

REFERENCE_ELEMENTS = 65536
"""Elements of an SDXL latent at 1024 pixels, for which the norm threshold is given."""


class APG(ScaledRule, frozen=True):
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416, algorithm 1).

    The difference of the predictions is smoothed by (reverse) momentum over the steps, bounded in
    norm, and split into parts along and across the prompt's denoised prediction; the part along
    it, which oversaturates, is weighted by ``eta``. All of it in denoised space, per row, with
    reductions in float64. In a step of two evaluations the momentum moves once.

    Departure from the paper: the norm threshold is stated for a latent of 65,536 elements and
    scaled by the square root of the size, so that one number serves all sizes.

    Reverse momentum also amplifies what turns back from step to step, threefold against what
    stays. At high scales a multistep sampler in few steps makes such swings, and then 0 is better
    (docs/guidance.md).
    """

    summary: ClassVar[str] = (
        "Less saturation at the same scale: drops the part parallel to the prediction."
    )
    source: ClassVar[str] = "Sadat et al., arXiv 2410.02416, algorithm 1."
    memory_slots: ClassVar[int] = 1
    name: Literal["apg"] = "apg"
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Weight of the part parallel to the prediction; 1 keeps all of it.",
    )
    norm_threshold: float = Field(
        default=15.0,
        ge=0,
        le=1000,
        description=(
            "Bound on the norm of the difference, for a latent of 65,536 elements; 0 is no bound."
        ),
    )
    momentum: float = Field(
        default=-0.5,
        gt=-1,
        lt=1,
        description=(
            "Weight of the earlier differences; negative values damp them. 0 is better for high "
            "scales in few steps of a multistep sampler."
        ),
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        kept = rows.memory[:, 0]
        smoothed = rows.cond - rows.other + parameters["momentum"] * kept
        bound = parameters["norm_threshold"] * (smoothed[0].numel() / REFERENCE_ELEMENTS) ** 0.5
        direction = smoothed.double()
        norm = inner(direction, direction).sqrt()
        direction = direction * (bound / norm).clamp(max=1).where((bound > 0) & (norm > 0), 1)
        cond = rows.cond.double()
        squared = inner(cond, cond)
        share = (inner(direction, cond) / squared).where(squared > 0, 0)
        along = share * cond
        push = (direction - along + parameters["eta"] * along).to(rows.cond.dtype)
        memory = smoothed.where(rows.closes_step, kept)[:, None]
        return Guided(rows.cond + (parameters["scale"] - 1) * push, rows.x, memory)

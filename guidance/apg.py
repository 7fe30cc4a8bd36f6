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
"""Number of elements of an SDXL latent at 1024 pixels, to which the norm threshold refers."""


class APG(ScaledRule, frozen=True):
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416, algorithm 1).

    The difference of the predictions is smoothed by (reverse) momentum over the steps, bounded in
    norm, and split into components parallel and orthogonal to the prompt's denoised prediction.
    The parallel component, which causes oversaturation, is weighted by ``eta``. Everything is in
    denoised space and per row, with reductions in float64. In a step with two evaluations the
    momentum is updated once.

    Departure from the paper: the norm threshold refers to a latent of 65,536 elements and is scaled
    by the square root of the actual number, so that one value suits all sizes.

    Reverse momentum (at the default) amplifies components that alternate in sign from step to step
    three times as much as constant ones. At high scales and with few steps a multistep sampler
    produces such oscillations; momentum 0 is then better (docs/guidance.md).
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

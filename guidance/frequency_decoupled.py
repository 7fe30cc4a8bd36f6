"""Guidance of one strength for detail and another for what is large."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.branch import NEGATIVE
from guidance.rule import Guided, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from guidance.branch import Branch

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""Burt and Adelson's filter, along each axis."""


class FrequencyDecoupled(Rule, frozen=True):
    """Frequency-decoupled guidance (Sadat et al., arXiv 2506.19713).

    CFG in a Laplacian pyramid of two levels, each with its own scale. The pyramid is linear, so
    all of it acts on the difference of the predictions, and any space gives the same. Latents of
    any size; at even ones the levels are kornia's, which the authors and diffusers use.
    """

    summary: ClassVar[str] = "One scale for detail and one for layout: crisp at low contrast."
    source: ClassVar[str] = "Sadat et al., arXiv 2506.19713."
    name: Literal["frequency_decoupled"] = "frequency_decoupled"
    scale: float = Field(
        default=5.0, ge=0, le=100, description="Strength for layout and colour; 1 is no guidance."
    )
    scale_high: float = Field(
        default=10.0, ge=0, le=100, description="Strength for detail; 1 is no guidance."
    )

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return () if self.scale == self.scale_high == 1 else (NEGATIVE,)

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        difference = rows.cond - rows.other
        coarse = low_frequencies(difference)
        detail = difference - coarse
        push = (parameters["scale_high"] - 1) * detail + (parameters["scale"] - 1) * coarse
        return Guided(rows.cond + push, rows.x, rows.memory)


def low_frequencies(picture: Tensor) -> Tensor:
    """What a Laplacian pyramid's first level leaves to the others, at full size.

    Blurred, halved, doubled, blurred; odd sides are halved upwards.

    Args:
        picture: ``[rows, C, h, w]``.

    Returns:
        The same shape.
    """
    from torch.nn.functional import interpolate

    height, width = picture.shape[-2:]
    half = ((height + 1) // 2, (width + 1) // 2)
    reduced = interpolate(_blurred(picture), size=half, mode="bilinear")
    return _blurred(interpolate(reduced, size=(height, width), mode="bilinear"))


def _blurred(picture: Tensor) -> Tensor:
    """Sums of shifted copies: unlike a convolution's, their bits never depend on the batch."""
    from torch.nn.functional import pad

    reach = len(KERNEL) // 2
    height, width = picture.shape[-2:]
    # Mirrored at the borders as kornia does; a side too short for that repeats its last cell.
    mode = "reflect" if min(height, width) > reach else "replicate"
    padded = pad(picture, (reach,) * 4, mode=mode)
    rows = reduce(add, (w * padded.narrow(-2, i, height) for i, w in enumerate(KERNEL)))
    return reduce(add, (w * rows.narrow(-1, i, width) for i, w in enumerate(KERNEL)))

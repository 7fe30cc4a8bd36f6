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

REACH = 8
"""Cells beyond a border: what lies farther out does not change the level inside it."""


class FrequencyDecoupled(Rule, frozen=True):
    """Frequency-decoupled guidance (Sadat et al., arXiv 2506.19713).

    CFG in a Laplacian pyramid of two levels, each with its own scale. The pyramid is linear, so
    all of it acts on the difference of the predictions, and any space gives the same. The levels
    are those of kornia's ``build_laplacian_pyramid``, which the authors and diffusers use.

    Departure from the source: kornia pads sides that it cannot halve, and diffusers goes on with
    the padded picture, which has another size than the latent. Here the padding is cut off again,
    so that latents of any size work.
    """

    summary: ClassVar[str] = "One scale for detail and one for layout: sharp at low contrast."
    source: ClassVar[str] = "Sadat et al., arXiv 2506.19713."
    name: Literal["frequency_decoupled"] = "frequency_decoupled"
    scale: float = Field(
        default=2.0, ge=0, le=100, description="Strength for layout and colour; 1 is no guidance."
    )
    scale_high: float = Field(
        default=4.0, ge=0, le=100, description="Strength for detail; 1 is no guidance."
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

    Blurred, halved, doubled, blurred.

    Args:
        picture: ``[rows, C, h, w]``.

    Returns:
        The same shape.
    """
    from torch.nn.functional import interpolate, pad

    height, width = picture.shape[-2:]
    below, right = _padding(height, width)
    picture = pad(picture, (0, right, 0, below), mode="reflect")
    whole = picture.shape[-2:]
    half = [(side + 1) // 2 for side in whole]
    reduced = interpolate(_blurred(picture), size=half, mode="bilinear")
    low = _blurred(interpolate(reduced, size=list(whole), mode="bilinear"))
    return low[..., :height, :width]


def _padding(height: int, width: int) -> tuple[int, int]:
    """Rows and columns by which a picture is continued, mirrored, below and to the right.

    kornia continues both sides to powers of two if neither is one, or if either is odd.
    """
    powers = [1 << (side - 1).bit_length() for side in (height, width)]
    if (powers[0] == height or powers[1] == width) and height % 2 == width % 2 == 0:
        return 0, 0
    # As far as it matters, and to an even side.
    below, right = (
        min(power - side, REACH + side % 2)
        for power, side in zip(powers, (height, width), strict=True)
    )
    return below, right


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

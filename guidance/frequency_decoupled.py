"""Guidance with separate scales for low and high spatial frequencies."""

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
"""Burt and Adelson's filter, applied along each axis."""

REACH = 8
"""Width of padding, in cells; cells farther outside do not affect the result inside."""


class FrequencyDecoupled(Rule, frozen=True):
    """Frequency-decoupled guidance (Sadat et al., arXiv 2506.19713).

    CFG in a Laplacian pyramid of two levels, each with its own scale. The pyramid is linear, so it
    can be applied to the difference of the predictions, and the result is the same in any space.
    The levels are those of kornia's ``build_laplacian_pyramid``, which the authors and diffusers
    use.

    Departure from the source: kornia pads sides that it cannot halve, and diffusers continues with
    the padded picture, whose size differs from the latent's. Here the padding is removed again, so
    that latents of any size work.
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
    """The low frequencies that the first level of a Laplacian pyramid leaves out, at full size.

    The picture is blurred, halved, doubled and blurred again.

    Args:
        picture: a picture or latent, ``[rows, C, h, w]``.

    Returns:
        Its low frequencies, of the same shape.
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
    """Number of mirrored rows and columns to pad below and to the right.

    kornia pads both sides to powers of two if neither is one, or if either is odd.
    """
    powers = [1 << (side - 1).bit_length() for side in (height, width)]
    if (powers[0] == height or powers[1] == width) and height % 2 == width % 2 == 0:
        return 0, 0
    # Only as far as it affects the result, and to an even side.
    below, right = (
        min(power - side, REACH + side % 2)
        for power, side in zip(powers, (height, width), strict=True)
    )
    return below, right


def _blurred(picture: Tensor) -> Tensor:
    """Blur by sums of shifted copies, whose bits, unlike a convolution's, ignore the batch size."""
    from torch.nn.functional import pad

    reach = len(KERNEL) // 2
    height, width = picture.shape[-2:]
    # Mirrored at the borders, as in kornia; a side too short for that repeats its last cell.
    mode = "reflect" if min(height, width) > reach else "replicate"
    padded = pad(picture, (reach,) * 4, mode=mode)
    rows = reduce(add, (w * padded.narrow(-2, i, height) for i, w in enumerate(KERNEL)))
    return reduce(add, (w * rows.narrow(-1, i, width) for i, w in enumerate(KERNEL)))

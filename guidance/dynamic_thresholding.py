"""Dynamic thresholding: clipping and rescaling of predictions with too large values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.rule import Guided, Rows, ScaledRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class DynamicThresholding(ScaledRule, frozen=True):
    """CFG with dynamic thresholding (Saharia et al., arXiv 2205.11487, section 2.3).

    The guided denoised prediction is clipped to ``[-s, s]`` and multiplied by ``limit / s``, where
    s is the quantile of its absolute values or ``limit``, whichever is greater, per row. Made for
    pixels in [-1, 1], that is ``limit`` 1. Latents have no such bounds; the default is a typical
    range of latents with unit standard deviation. Nor are latents centered, so shrinking them
    changes colors: in measurements on the embedded model the rule did harm. At scale 1 it does
    nothing.
    """

    summary: ClassVar[str] = "CFG, clipped and rescaled to a limit; made for pixel models."
    source: ClassVar[str] = "Saharia et al., arXiv 2205.11487, section 2.3."
    name: Literal["dynamic_thresholding"] = "dynamic_thresholding"
    quantile: float = Field(
        default=0.995, ge=0.5, le=1, description="Fraction of the elements that is not clipped."
    )
    limit: float = Field(
        default=3.0,
        ge=0.125,
        le=1000,
        description="Limit that predictions are rescaled to: 1 for pixels, 3 and more for latents.",
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        scale, limit = parameters["scale"], parameters["limit"]
        guided = rows.cond + (scale - 1) * (rows.cond - rows.other)
        reach = quantile(guided.abs(), parameters["quantile"]).maximum(limit)
        drawn_in = guided.minimum(reach).maximum(-reach) * (limit / reach)
        return Guided(drawn_in.where(scale != 1, guided), rows.x, rows.memory)


def quantile(sizes: Tensor, share: Tensor) -> Tensor:
    """A quantile of each row, with a probability per row and linear interpolation.

    Args:
        sizes: values, ``[rows, C, h, w]``.
        share: probability of each row, in [0, 1], ``[rows, 1, 1, 1]``.

    Returns:
        The quantiles, ``[rows, 1, 1, 1]``.
    """
    ordered = sizes.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    place = share.double().view(-1, 1) * last
    below = place.floor().long()
    above = (below + 1).clamp(max=last)
    weight = (place - below).to(sizes.dtype)
    found = ordered.gather(1, below).lerp(ordered.gather(1, above), weight)
    return found.view(-1, *[1] * (sizes.ndim - 1))

"""Guidance rescaled to the standard deviation of the prompt's prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.reductions import covariance
from guidance.rule import Guided, Rows, ScaledRule, numbers_like, stack
from guidance.velocity import velocity_share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from torch import Tensor


class CFGRescale(ScaledRule, frozen=True):
    """Rescaled classifier-free guidance (Lin et al., arXiv 2305.08891, section 3.4).

    The guided prediction y is multiplied by ``rescale std(y_c) / std(y) + 1 - rescale``, with
    standard deviations over each row. The result depends on the space. The paper's model predicts
    velocities, and velocities are the default here on any model; diffusers uses the raw output of
    the network, so ``noise`` equals diffusers for networks that predict noise.

    It is implemented as a change of the guided prediction that is finite also at pure noise, where
    noise space would have ``D = (x - sigma eps) / alpha``.
    """

    summary: ClassVar[str] = (
        "CFG rescaled to the prompt's standard deviation; against overexposure."
    )
    source: ClassVar[str] = "Lin et al., arXiv 2305.08891, section 3.4."
    name: Literal["cfg_rescale"] = "cfg_rescale"
    rescale: float = Field(
        default=0.7, ge=0, le=1, description="Weight of the rescaled prediction; 0 is plain CFG."
    )
    space: Literal["velocity", "noise", "denoised"] = Field(
        default="velocity",
        description=(
            "Space in which standard deviations are taken; noise is what diffusers does for "
            "networks that predict noise."
        ),
    )

    @classmethod
    @override
    def parameters(  # pyright: ignore[reportIncompatibleMethodOverride] - Self narrows with it
        cls, settings: Sequence[Self], like: Tensor
    ) -> Mapping[str, Tensor]:
        numbers = stack(settings, like)
        ones = [1] * (like.ndim - 1)
        for space in ("velocity", "noise"):
            chosen = [float(setting.space == space) for setting in settings]
            numbers[space] = numbers_like(like, chosen).view(-1, *ones)
        return numbers

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        push = (parameters["scale"] - 1) * (rows.cond - rows.other)
        guided = rows.cond + push
        # y = of_x x - of_denoised D, up to a factor that cancels in the ratio of the deviations.
        noise = parameters["noise"]
        of_x = noise + parameters["velocity"] * velocity_share(rows.alpha, rows.sigma)
        of_denoised = rows.alpha.where(noise > 0, 1)
        y = of_x * rows.x - of_denoised * guided
        y_cond = y + of_denoised * push
        spread, spread_cond = covariance(y, y).sqrt(), covariance(y_cond, y_cond).sqrt()
        # (spread_cond / spread - 1) / of_denoised, without subtracting nearly equal numbers.
        excess = covariance(y + y_cond, push)
        total = spread * (spread + spread_cond)
        change = parameters["rescale"] * (excess / total).where(total > 0, 0)
        return Guided(guided - (change * y).to(guided.dtype), rows.x, rows.memory)

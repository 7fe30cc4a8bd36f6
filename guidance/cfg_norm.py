"""CFG norm: guidance that preserves the norm of each token's velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from guidance.velocity import velocity_share
from guidance.window import Window

if TYPE_CHECKING:
    from torch import Tensor


class CFGNorm(Window, frozen=True):
    """Rescales the guided prediction to the norm of the prompt's own, token by token.

    As in Qwen-Image's pipeline, ``v <- v |v_c| / |v|`` with v the guided velocity and v_c the
    prompt's. Norms are over the channels of one token, and the rescaling comes after all other
    guidance. The formula is for flow matching, where ``v = (x - D) / sigma``; for other models it
    uses the velocity of their own path, as ``cfg_zero_star`` does. Costs no evaluation.

    A token is one cell of the latent, or ``patch`` x ``patch`` cells: Qwen-Image packs 2 x 2 cells
    of 16 channels into a token of 64, so ``patch`` 2 gives its pipeline's result.

    With ``variant`` ``denoised`` it equals ComfyUI's node ``CFGNorm`` at its defaults: it acts on
    the denoised prediction, only reduces norms, and ``strength`` multiplies the result:
    ``D <- strength min(1, |D_c| / |D|) D``. With ``velocity``, ``strength`` blends between plain
    guidance (0) and full rescaling (1), as that node does with ``pre_cfg``.

    With ``variant`` ``picture`` it equals ``cfg_normalization`` of Z-Image's pipeline: the norm is
    that of the whole picture's velocity, which is only ever reduced; ``strength`` blends here too.
    """

    summary: ClassVar[str] = "Keeps the norm of each token's prediction; tames strong guidance."
    source: ClassVar[str] = (
        "Qwen-Image's and Z-Image's pipelines in diffusers; ComfyUI's node CFGNorm."
    )
    variant: Literal["velocity", "denoised", "picture"] = Field(
        default="velocity",
        description="What is rescaled: the velocity, as in Qwen-Image's pipeline; the denoised "
        "prediction, which is only ever shortened, as by ComfyUI's node; or the velocity of the "
        "whole picture, only ever shortened, as by cfg_normalization of Z-Image's pipeline.",
    )
    strength: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="1 is the full rescale. Below, `denoised` multiplies the prediction, and the "
        "others blend with plain guidance.",
    )
    patch: Literal[1, 2] = Field(
        default=1,
        description="Latent cells along one side of a token; 2 for Qwen-Image; 1 with `picture`.",
    )

    @model_validator(mode="after")
    def _of_tokens(self) -> Self:
        if self.variant == "picture" and self.patch != 1:
            raise ValueError(
                f"patch is {self.patch} and variant 'picture', which takes a picture as a whole; "
                "leave patch out"
            )
        return self

    def rescale(
        self,
        denoised: Tensor,
        cond: Tensor,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        strength: Tensor | float,
    ) -> Tensor:
        """The rescaled prediction of each row, ``[rows, C, h, w]``.

        Args:
            denoised: guided predictions, ``[rows, C, h, w]``.
            cond: the prompts' own predictions, of the same shape.
            x: points that were evaluated, of the same shape.
            alpha: signal scale at these points, ``[rows, 1, 1, 1]``.
            sigma: noise scale at these points, ``[rows, 1, 1, 1]``.
            strength: strength of each row, ``[rows, 1, 1, 1]``, or one for all rows.
        """
        if self.variant == "denoised":
            return strength * _ratio(denoised, cond, self.patch).clamp(max=1) * denoised
        still = velocity_share(alpha, sigma) * x
        if self.variant == "picture":
            ratio = _ratio(still - denoised, still - cond, None).clamp(max=1)
        else:
            ratio = _ratio(still - denoised, still - cond, self.patch)
        return denoised + strength * (1 - ratio) * (still - denoised)


def _ratio(guided: Tensor, cond: Tensor, patch: int | None) -> Tensor:
    """``|cond| / |guided|`` of the token that each cell belongs to, ``[rows, 1, h, w]``.

    It is 1 where the guided token is zero. Tokens cut by the border consist of the remaining cells.
    If patch is None, the whole picture is one token: ``[rows, 1, 1, 1]``.
    """
    over = (1, 2, 3) if patch is None else 1
    squared = [one.square().sum(over, keepdim=True) for one in (cond, guided)]
    if patch is not None and patch > 1:
        squared = [_pooled(one, patch) for one in squared]
    lengths, own = squared
    return (lengths / own).sqrt().where(own > 0, 1)


def _pooled(cells: Tensor, patch: int) -> Tensor:
    """The mean over each patch, repeated in all of its cells, ``[rows, 1, h, w]``."""
    from torch.nn.functional import avg_pool2d

    height, width = cells.shape[-2:]
    means = avg_pool2d(cells, patch, ceil_mode=True)
    spread = means.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return spread[..., :height, :width]

"""Tangential damping of the unconditional prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.reductions import inner
from guidance.rule import Guided, Rows, ScaledRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class TCFG(ScaledRule, frozen=True):
    """Tangential damping CFG (Kwon et al., arXiv 2503.18137, listing 1).

    The unconditional noise is projected onto the first right singular vector of the two noises, per
    row, and then CFG is applied. This is done in noise space, as the paper does it for scores;
    diffusers does the same with the raw output of the network.

    For two vectors there is a closed form. With eps_c, eps_u and the first unit eigenvector (a, b)
    of their Gram matrix, the projection is ``b (a eps_c + b eps_u)``, and the difference that
    guidance uses, in denoised space, is ``b^2 d - a (a - b) (x - alpha Dc) / alpha`` with
    ``d = Dc - Du``. Near pure noise a and b approach each other, so guidance uses half of the
    component of d that is orthogonal to the noise.
    """

    summary: ClassVar[str] = (
        "CFG without the unconditional noise's tangential part, for better quality."
    )
    source: ClassVar[str] = "Kwon et al., arXiv 2503.18137, listing 1."
    name: Literal["tcfg"] = "tcfg"
    damping: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Fraction of the tangential part that is removed; 0 is plain CFG.",
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        alpha, cond = rows.alpha.double(), rows.cond.double()
        noise = rows.x.double() - alpha * cond
        difference = cond - rows.other.double()
        across, length = inner(noise, difference), inner(difference, difference)
        # Entries of the Gram matrix of noise and noise + alpha difference. The eigenvector is at
        # 45 degrees minus delta; tan(2 delta) is lean / (2 product), and lean vanishes with alpha.
        lean_by_alpha = -(2 * across + alpha * length)
        lean = alpha * lean_by_alpha
        twice_product = 2 * (inner(noise, noise) + alpha * across)
        size = lean.hypot(twice_product)
        cosine = ((1 + twice_product / size) / 2).sqrt()
        sine_by_alpha = lean_by_alpha / size / (2 * cosine)
        sine = alpha * sine_by_alpha
        a, b_squared = (cosine + sine) / 2**0.5, (cosine - sine).square() / 2
        damped = b_squared * difference - a * 2**0.5 * sine_by_alpha * noise
        damped = damped.where(size * cosine > 0, difference)
        push = difference + parameters["damping"] * (damped - difference)
        guided = rows.cond + ((parameters["scale"] - 1) * push).to(rows.cond.dtype)
        return Guided(guided, rows.x, rows.memory)

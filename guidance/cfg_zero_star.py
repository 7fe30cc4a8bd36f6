"""CFG-Zero*: a fitted factor on the unconditional velocity, and zero velocity at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.reductions import inner
from guidance.rule import Guided, Rows, ScaledRule
from guidance.velocity import velocity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class CFGZeroStar(ScaledRule, frozen=True):
    """CFG-Zero* (Fan et al., arXiv 2503.18886).

    For velocities, ``v = a v_u + scale (v_c - a v_u)``, where ``a = <v_c, v_u> / |v_u|^2`` brings
    the unconditional velocity closest to the prompt's, per row; and ``v = 0`` in the first steps.
    Published for flow matching; other models use the velocity of their own path, so that zero
    always means that x does not move. (diffusers zeroes the network's raw output: for a network
    that predicts noise, that means the denoised prediction x / alpha.)

    Where a policy leaves the first steps unguided, they keep their velocity. At scale 1 the rule
    does nothing, like the other rules.
    """

    summary: ClassVar[str] = (
        "CFG with a fitted factor on the unconditional velocity, and zero velocity at first."
    )
    source: ClassVar[str] = "Fan et al., arXiv 2503.18886."
    name: Literal["cfg_zero_star"] = "cfg_zero_star"
    fitted: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Weight of the fitted factor on the unconditional velocity; 0 leaves the velocity as "
            "it is."
        ),
    )
    zero_init: float = Field(
        default=0.04,
        ge=0,
        le=0.5,
        description="Fraction of the steps, from the first, with zero velocity; 0 is none.",
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        scale = parameters["scale"]
        v_c, v_u = velocity(rows, rows.cond), velocity(rows, rows.other)
        squared = inner(v_u, v_u)
        best = (inner(v_c, v_u) / squared).where(squared > 0, 1)
        fit = 1 + parameters["fitted"] * (best - 1)
        guided = v_c + (scale - 1) * (v_c - fit * v_u)
        moving = (rows.progress >= parameters["zero_init"]) | (scale == 1)
        denoised = velocity(rows, guided.where(moving, 0)).to(rows.cond.dtype)
        return Guided(denoised, rows.x, rows.memory)

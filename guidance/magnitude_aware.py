"""Guidance that is weaker where the difference of the predictions is large."""

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


class MagnitudeAware(ScaledRule, frozen=True):
    """Magnitude-aware mitigation for boosted guidance (MAMBO-G, arXiv 2508.03442).

    CFG with the scale ``1 + (scale - 1) exp(-damping |v_c - v_u| / |v_u|)``, per row and stage. The
    paper's models predict velocities, and so velocities are used here: the norm of v_u depends on
    the space.
    """

    summary: ClassVar[str] = "High scales, reduced at stages where guidance is already large."
    source: ClassVar[str] = "MAMBO-G, arXiv 2508.03442."
    name: Literal["magnitude_aware"] = "magnitude_aware"
    scale: float = Field(default=10.0, ge=0, le=100, description="Strength; 1 is no guidance.")
    damping: float = Field(
        default=8.0, ge=0, le=100, description="How fast the strength falls; 0 is plain CFG."
    )

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        difference = rows.cond - rows.other
        v_u = velocity(rows, rows.other)
        squared = inner(v_u, v_u)
        ratio = (inner(difference, difference) / squared).sqrt().where(squared > 0, 0)
        strength = (parameters["scale"] - 1) * (-parameters["damping"] * ratio).exp()
        return Guided(rows.cond + strength.to(difference.dtype) * difference, rows.x, rows.memory)

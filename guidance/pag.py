"""Perturbed-attention guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from guidance.edits import IdentityAttention
from guidance.perturbation import Layers, Perturbation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from guidance.diffusion_levels import DiffusionLevels
    from guidance.edits import Edit

LAST_TIMESTEP = 999
"""The last of the 1000 timesteps, counted from 0, that diffusion models are trained at."""


class PAG(Perturbation, frozen=True):
    """Perturbed-attention guidance (Ahn et al., arXiv 2403.17377, section 4).

    In the perturbed network, self-attention returns its values, as if each position attended only
    to itself. This gives pictures without structure, which guidance moves away from. No second
    prompt is needed.

    As in diffusers' pipelines (``pag_adaptive_scale``), the strength can decrease along the run:
    ``max(0, scale - adaptive_scale (1000 - t))``, with t the timestep, 999 at noise. On
    continuous-time models, t is the fraction of the diffusion's time multiplied by 999.
    """

    summary: ClassVar[str] = "Steers away from a prediction without self-attention."
    source: ClassVar[str] = "Ahn et al., arXiv 2403.17377, section 4."
    name: Literal["pag"] = "pag"
    adaptive_scale: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description=(
            "How much the strength falls with each of the 1000 training timesteps passed; 0 keeps "
            "it constant."
        ),
    )
    layers: Layers = ("middle",)

    @property
    @override
    def edit(self) -> Edit:
        return IdentityAttention(self.layers)

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        behind = LAST_TIMESTEP + 1 - LAST_TIMESTEP * levels.time
        return np.maximum(0.0, self.scale - self.adaptive_scale * behind)

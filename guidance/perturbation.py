"""The interface of perturbations: guidance away from a deliberately degraded prediction."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

import numpy as np
from pydantic import AfterValidator, Field

from guidance.window import Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from guidance.diffusion_levels import DiffusionLevels
    from guidance.edits import Edit


def _by_our_names(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("middle" if layer == "mid" else layer for layer in layers)


Layers: TypeAlias = Annotated[
    tuple[str, ...],
    Field(
        min_length=1,
        max_length=64,
        strict=False,
        description=(
            "Layers to act on: 'middle' (diffusers' 'mid'), names of the model's layers, or "
            "prefixes of such names."
        ),
    ),
    AfterValidator(_by_our_names),
]
"""Layers of a network; ``mid`` becomes ``middle``."""


class Perturbation(Window, frozen=True):
    """A term ``scale (Dc - Dp)``, with Dp the prompt's prediction by a perturbed network.

    Any number of such terms are added to the result of the rule, so they are compatible with any
    rule and policy, and the meaning of ``scale`` does not depend on those. The difference is linear
    in the predictions, so the result is the same in any space. Outside its window a term costs
    nothing.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    name: str
    scale: float = Field(default=3.0, ge=0, le=100, description="Strength; 0 has no effect.")

    @property
    @abstractmethod
    def edit(self) -> Edit:
        """The change made inside the network."""

    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the perturbed prediction is evaluated, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: fraction of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        return self.contains(noise_ratio, progress) & (self.scale != 0)

    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        """The factor on the term at each stage, ``[stages]``, without regard to the window.

        It is ``scale`` everywhere unless a perturbation overrides this. Where it is 0, the
        perturbed prediction is not needed.

        Args:
            levels: positions of the stages in the diffusion.
        """
        return np.full(len(levels.time), self.scale)

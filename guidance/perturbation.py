"""What a perturbation is: guidance away from a prediction that is worse on purpose."""

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
    """A term ``scale (Dc - Dp)``, Dp the prompt's prediction by a network that was disturbed.

    Such terms are added to what the rule gives, any number of them, so they go with any rule and
    policy, and ``scale`` is their strength whatever those are. The difference is linear in the
    prediction, so every space gives the same. Outside its window a term costs nothing.
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
        """What is changed inside the network."""

    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the disturbed prediction is evaluated, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: share of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        return self.contains(noise_ratio, progress) & (self.scale != 0)

    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        """What the term is multiplied by at each stage, ``[stages]``, window aside.

        ``scale`` everywhere, unless a perturbation has it otherwise. Where it is 0 the disturbed
        prediction is not needed.

        Args:
            levels: where the stages stand in the diffusion.
        """
        return np.full(len(levels.time), self.scale)

"""What a perturbation is: guidance away from a prediction that is worse on purpose."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from pydantic import Field

from guidance.window import Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from guidance.edits import Edit

Layers: TypeAlias = Annotated[
    tuple[str, ...],
    Field(
        min_length=1,
        max_length=64,
        strict=False,
        description="Where: 'middle', names of the model's layers, or beginnings of such names.",
    ),
]


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
    scale: float = Field(default=3.0, ge=0, le=100, description="Strength; 0 is none.")

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

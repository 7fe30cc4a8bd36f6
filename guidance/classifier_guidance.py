"""What guidance by a classifier is: one more term, from what a classifier makes of the picture."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field
from typing_extensions import override

from guidance.window import Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.diffusion_levels import DiffusionLevels

UNAIMED = -1
"""Number of the class that stands for none, where an attribute is left as it comes."""

Target: TypeAlias = Annotated[
    dict[str, str],
    Field(
        max_length=16,
        description="Classes to aim at, by attribute, in the words of the model's classifier.",
    ),
]


class ClassifierGuidance(Window, frozen=True):
    """A term that a classifier of the model's latents adds to what rule and perturbations give.

    It goes with any rule, policy and perturbations. What the classifier costs is no evaluation of
    the denoiser; ``evaluations`` says what else a stage in the window costs.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    shows: ClassVar[Literal["denoised", "noisy"]] = "noisy"
    """What the classifier reads: the guided prediction as a clean latent, or x at its level."""
    evaluations: ClassVar[int] = 0
    """Rows of the denoiser that a stage takes beside those of rule and perturbations."""
    name: str
    scale: float = Field(default=1.0, ge=0, le=100, description="Strength; 0 has no effect.")

    @property
    @abstractmethod
    def aims(self) -> Mapping[str, str]:
        """The class to aim at of each attribute that is aimed at."""

    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the term acts, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: share of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        return self.contains(noise_ratio, progress) & (self.scale != 0)

    @abstractmethod
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        """What the term is multiplied by at each stage, ``[stages]``, window aside."""


class GradientGuidance(ClassifierGuidance, frozen=True):
    """The prediction moves up the gradient of what the classifier is asked for.

    The score gains ``scale grad``, so the noise ``eps -= sigma scale grad`` and the denoised
    prediction ``D += (sigma^2 / alpha) scale grad``. One pass of the classifier, forth and back.
    """

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        # Without any signal there is no picture to move, and no finite amount to move it by.
        signal = levels.alpha > 0
        inverse = np.divide(1.0, levels.alpha, out=np.zeros_like(levels.alpha), where=signal)
        return self.scale * levels.sigma**2 * inverse

    @classmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """What :meth:`objective` is given of its rows' settings, each ``[rows]``.

        Args:
            settings: one a row.
            like: gives type and device.
        """
        del settings, like
        return {}

    @classmethod
    @abstractmethod
    def objective(
        cls,
        logits: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        """What each row's gradient is taken of, ``[rows]``.

        Args:
            logits: of each attribute, ``[rows, classes]``.
            targets: number of the class aimed at, ``[rows]`` int64; ``UNAIMED`` where a row has
                none of that attribute.
            parameters: what :meth:`parameters` gave.
        """


class Reference(NamedTuple):
    """Which of its other prompts leads each row away, ``[rows]``, and how strongly, ``[rows]``."""

    choice: Tensor
    strength: Tensor


class ReferenceGuidance(ClassifierGuidance, frozen=True):
    """A term ``scale strength (Dc - Dr)``, Dr told a prompt that the classifier chooses.

    One pass of the classifier, forth only, and one evaluation of the denoiser.
    """

    evaluations: ClassVar[int] = 1

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        return np.full_like(levels.alpha, self.scale)

    @abstractmethod
    def alternatives(self, prompt: str, heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The prompts that the classifier chooses among.

        Args:
            prompt: of the picture.
            heads: the classes of each attribute that the classifier knows.

        Raises:
            ValueError: the prompt does not say what is aimed at.
        """

    @classmethod
    @abstractmethod
    def refer(cls, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Reference:
        """Choose among the alternatives of each row.

        Args:
            logits: of each attribute, ``[rows, classes]``, of x at its own level.
            targets: as for :meth:`GradientGuidance.objective`.
        """

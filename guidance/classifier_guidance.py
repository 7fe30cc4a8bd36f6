"""The interface of classifier guidance: an additional term computed from a classifier."""

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
"""Class index that stands for no target: the attribute is left free."""

Target: TypeAlias = Annotated[
    dict[str, str],
    Field(
        max_length=16,
        description="Classes to aim at, by attribute, in the words of the model's classifier.",
    ),
]


class ClassifierGuidance(Window, frozen=True):
    """A term that a classifier of the model's latents adds to the guided prediction.

    It is added after the rule and the perturbations, and is compatible with all of them and with
    any policy. The classifier itself takes no evaluation of the denoiser; ``evaluations`` is the
    number of further evaluations that a stage in the window takes.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    shows: ClassVar[Literal["denoised", "noisy"]] = "noisy"
    """The classifier's input: the guided prediction as a clean latent, or x at its noise level."""
    evaluations: ClassVar[int] = 0
    """Rows of a forward pass that a stage takes in addition to those of rule and perturbations."""
    name: str
    scale: float = Field(default=1.0, ge=0, le=100, description="Strength; 0 has no effect.")

    @property
    @abstractmethod
    def aims(self) -> Mapping[str, str]:
        """The target class of each attribute that has one."""

    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the term acts, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: fraction of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        return self.contains(noise_ratio, progress) & (self.scale != 0)

    @abstractmethod
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        """The factor on the term at each stage, ``[stages]``, without regard to the window."""


class GradientGuidance(ClassifierGuidance, frozen=True):
    """A term along the gradient of an objective of the classifier's outputs.

    The term ``scale grad`` is added to the score, so ``eps -= sigma scale grad`` for the noise and
    ``D += (sigma^2 / alpha) scale grad`` for the denoised prediction. It takes one forward and one
    backward pass of the classifier.
    """

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        # Without any signal there is no picture to move, and the factor would be infinite.
        signal = levels.alpha > 0
        inverse = np.divide(1.0, levels.alpha, out=np.zeros_like(levels.alpha), where=signal)
        return self.scale * levels.sigma**2 * inverse

    @classmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """The parameters that :meth:`objective` gets from its rows' settings, each ``[rows]``.

        Args:
            settings: settings of each row.
            like: tensor whose dtype and device are used.
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
        """The objective of each row whose gradient is taken, ``[rows]``.

        Args:
            logits: logits of each attribute, ``[rows, classes]``.
            targets: index of the target class of each attribute, ``[rows]`` int64; ``UNAIMED``
                where a row has no target for that attribute.
            parameters: result of :meth:`parameters`.
        """


class Reference(NamedTuple):
    """Alternative prompt that each row is guided away from, and its strength: ``[rows]`` each."""

    choice: Tensor
    strength: Tensor


class ReferenceGuidance(ClassifierGuidance, frozen=True):
    """A term ``scale strength (Dc - Dr)``, with Dr for a prompt that the classifier chooses.

    It takes one forward pass of the classifier and one evaluation of the denoiser.
    """

    evaluations: ClassVar[int] = 1

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        return np.full_like(levels.alpha, self.scale)

    @abstractmethod
    def alternatives(self, prompt: str, heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The prompts that the classifier chooses among.

        Args:
            prompt: prompt of the picture.
            heads: classes of each attribute that the classifier knows.

        Raises:
            ValueError: the prompt does not contain the target.
        """

    @classmethod
    @abstractmethod
    def refer(cls, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Reference:
        """Choose among the alternatives of each row.

        Args:
            logits: logits of each attribute for x at its noise level, ``[rows, classes]``.
            targets: as for :meth:`GradientGuidance.objective`.
        """

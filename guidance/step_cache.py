"""The interface of step caches, which skip the network where its output would hardly change."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from guidance.window import Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Evaluation(NamedTuple):
    """Input and output of a network that predicts the velocity.

    Predictions of any other network must be converted to the velocity first. An error in the
    velocity is multiplied by sigma in the denoised prediction; one in the noise is multiplied by
    sigma / alpha, which is many times larger early in a run.

    Attributes:
        x: input of the network, at its own scale, ``[rows, C, h, w]``.
        output: raw output of the network, ``[rows, C, h, w]``.
    """

    x: Tensor
    output: Tensor


class Decision(NamedTuple):
    """Which images recall their outputs at the next stage, and the updated state of the cache.

    Attributes:
        recalls: whether each image recalls its outputs, bool ``[rows]``.
        numbers: numbers of the cache for images that recall, ``[rows, n]``.
    """

    recalls: Tensor
    numbers: Tensor


class StepCache(Window, frozen=True):
    """A step cache's parameters and decisions.

    It decides before a stage whether the network is evaluated there, so an image that recalls its
    last outputs takes no row of the forward pass. The prompt's own row decides for all predictions
    of the image. A stage is one evaluation that the sampler's plan asks for: with samplers that
    evaluate several times in a step, each is decided separately. All methods on tensors are pure
    and independent per row.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    warm_up: ClassVar[int] = 1
    """Number of evaluations that the cache needs before it can decide."""
    name: str

    def may_recall(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages it decides, ``[stages]``; all others are evaluated, among them the last.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: fraction of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        inside = self.contains(noise_ratio, progress)
        inside[: self.warm_up] = False
        inside[-1] = False
        return inside

    @classmethod
    @abstractmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """The parameters that ``decide`` gets from the rows' settings, each ``[rows, ...]``.

        Args:
            settings: settings of each row.
            like: tensor ``[rows, C, h, w]`` whose device is used.
        """

    @classmethod
    @abstractmethod
    def learned(cls, before: Evaluation, now: Evaluation) -> Tensor:
        """The cache's numbers after an evaluation, ``[rows, n]``.

        Args:
            before: the previous evaluation; zeros at the first.
            now: this evaluation.
        """

    @classmethod
    @abstractmethod
    def decide(
        cls,
        last: Evaluation,
        numbers: Tensor,
        x: Tensor,
        following: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Decision:
        """Whether the next stage recalls the outputs of the last evaluation.

        Args:
            last: the last evaluation.
            numbers: numbers from :meth:`learned` at that evaluation, or from the last decision to
                recall.
            x: input of the network at this stage, evaluated or not, ``[rows, C, h, w]``.
            following: input of the network at the next stage, of the same shape.
            parameters: result of :meth:`parameters`.
        """

    @classmethod
    def recalled(cls, last: Evaluation, x: Tensor) -> Tensor:
        """The output used at ``x`` instead of an evaluation: output minus input stays constant.

        Args:
            last: last evaluation of any of an image's predictions.
            x: input of the network at the stage that is not evaluated, ``[rows, C, h, w]``.
        """
        return x + (last.output - last.x)

"""What a step cache is: it predicts that the network would say little new, and recalls the last."""

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
    """What a network that predicts the velocity was given and put out.

    Predictions of any other network are to be written as the velocity first. An error of it counts
    sigma times in the denoised prediction; one of the noise counts sigma / alpha times, which early
    in a run is many times more.

    Attributes:
        x: its input, at its own scale, ``[rows, C, h, w]``.
        output: its output there, as it is, ``[rows, C, h, w]``.
    """

    x: Tensor
    output: Tensor


class Decision(NamedTuple):
    """Which images recall their outputs at the next stage, and what the cache counts on.

    Attributes:
        recalls: bool ``[rows]``.
        numbers: of the cache, ``[rows, n]``, for an image that recalls.
    """

    recalls: Tensor
    numbers: Tensor


class StepCache(Window, frozen=True):
    """A step cache's parameters, and its decisions.

    It decides before a stage whether the network is evaluated there, so an image that recalls its
    last outputs takes no row of the forward. The prompt's own row decides for all predictions of
    the image. A stage is one evaluation: of a sampler with several a step each is decided by
    itself. All methods on tensors are pure, and treat each row by itself.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    warm_up: ClassVar[int] = 1
    """Evaluations that it must have seen before it can decide."""
    name: str

    def may_recall(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages it decides, ``[stages]``; the others are evaluated, as the last is.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: share of the steps done before each stage, in [0, 1), ``[stages]``.
        """
        inside = self.contains(noise_ratio, progress)
        inside[: self.warm_up] = False
        inside[-1] = False
        return inside

    @classmethod
    @abstractmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """What ``decide`` is given of the rows' settings, each ``[rows, ...]``.

        Args:
            settings: one a row.
            like: ``[rows, C, h, w]``, gives the device.
        """

    @classmethod
    @abstractmethod
    def learned(cls, before: Evaluation, now: Evaluation) -> Tensor:
        """The cache's numbers after an evaluation, ``[rows, n]``.

        Args:
            before: the evaluation before this one; zeros at the first.
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
            numbers: that were learned there, or counted at the last decision to recall.
            x: what the network is given at this stage, evaluated or not, ``[rows, C, h, w]``.
            following: what it is given at the next, as ``x``.
            parameters: what :meth:`parameters` gave.
        """

    @classmethod
    def recalled(cls, last: Evaluation, x: Tensor) -> Tensor:
        """What stands for the output at ``x``: the difference of output and input is kept.

        Args:
            last: an evaluation, of any of an image's predictions.
            x: the network's input at the stage that is not evaluated, ``[rows, C, h, w]``.
        """
        return x + (last.output - last.x)

"""EasyCache: skip the network while its output is predicted to change only slightly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.step_cache import Decision, StepCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from torch import Tensor

    from guidance.step_cache import Evaluation


class EasyCache(StepCache, frozen=True):
    """Runtime-adaptive caching (Zhou et al., arXiv 2507.02860).

    Let x be the network's inputs and v its outputs, mean|.| the mean of absolute values over an
    image, and m and n the last two stages that were evaluated::

        k = mean|v_n - v_m| / mean|x_n - x_m|                transformation rate
        E = sum over i > n of k mean|x_i - x_{i-1}| / mean|v_n|     predicted relative change

    While E < threshold, stage i is not evaluated, and ``v_i = x_i + (v_n - x_n)`` is used instead.
    Once E reaches the threshold, the stage is evaluated and E restarts from 0. These are the
    formulas of the authors' code for Wan 2.2 and HunyuanVideo, in which the last evaluation of a
    run is also always made. Their defaults are a threshold of 0.05 and 7 first steps that are
    always evaluated for Wan 2.2, and 0.025 and 5 for HunyuanVideo. Those networks predict the
    velocity; the output of any other network is converted to one. Means are computed in float64.
    """

    summary: ClassVar[str] = "Skips the network while its output is predicted to change little."
    source: ClassVar[str] = "Zhou et al., arXiv 2507.02860; the authors' code for Wan 2.2."
    warm_up: ClassVar[int] = 2
    name: Literal["easy_cache"] = "easy_cache"
    threshold: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Predicted relative change of the network's output since it was last "
        "evaluated, up to which it is not evaluated again; 0 always evaluates, and higher values "
        "skip more.",
    )
    start: float = Field(
        default=0.15, ge=0, lt=1, description="Fraction of the steps after which it starts to act."
    )

    @classmethod
    @override
    def parameters(  # pyright: ignore[reportIncompatibleMethodOverride] - Self narrows with it
        cls, settings: Sequence[Self], like: Tensor
    ) -> Mapping[str, Tensor]:
        from torch import float64, tensor

        thresholds = tensor([one.threshold for one in settings], dtype=float64)
        return {"threshold": thresholds.to(like.device, non_blocking=True)}

    @classmethod
    @override
    def learned(cls, before: Evaluation, now: Evaluation) -> Tensor:
        from torch import stack, zeros_like

        rate = _mean(now.output - before.output) / _mean(now.x - before.x)
        return stack([rate, zeros_like(rate)], 1)

    @classmethod
    @override
    def decide(
        cls,
        last: Evaluation,
        numbers: Tensor,
        x: Tensor,
        following: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Decision:
        from torch import stack

        rate, change = numbers.unbind(1)
        change = change + rate * _mean(following - x) / _mean(last.output)
        return Decision(change < parameters["threshold"], stack([rate, change], 1))


def _mean(x: Tensor) -> Tensor:
    """Mean absolute value of each row, ``[rows]``."""
    return x.flatten(1).double().abs().mean(1)

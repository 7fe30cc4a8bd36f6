"""EluCD: guidance by any classifier of clean pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from guidance.classifier_guidance import UNAIMED, GradientGuidance, Target
from guidance.rule import numbers_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.diffusion_levels import DiffusionLevels


class EluCD(GradientGuidance, frozen=True):
    """EluCD (Ma et al., arXiv 2310.11311, section 4).

    The classifier reads the denoised prediction, and the gradient is taken with respect to that
    prediction, not through the denoiser: ``g = grad_D [T1 logit_y - logsumexp(T2 logits)]``. T1 is
    1 and T2 is .5, so that the gradient does not vanish where the classifier is certain of y. The
    objectives of several attributes are summed.

    The published form shifts the DDPM mean, ``mu += (V + gamma V_max sin(pi t / T)) g``, with V the
    variance of the step. That mean is ``alpha_s beta / sigma^2 D`` plus a term in x, where alpha_s
    is the signal scale after the step and beta the noise that the step removes, so the equivalent
    shift of D is ``(sigma^2 / (alpha_s beta)) (V + ...) g``. As steps shrink, V -> beta and
    alpha_s -> alpha:

        D += (sigma^2 / alpha) (1 + gamma sin(pi t / T) beta_max / beta(t)) g

    for any sampler: the length of the step cancels, and eps changes by ``-sigma (1 + ...) g``. beta
    is that of a trained step or, for schedules that are not variance preserving, that at the same
    log SNR. Here the classifier reads the guided prediction, and the term is 0 at pure noise.

    On the embedded model ``scale`` 1 is best for classes that the prompt names, and 4 for those
    that it does not mention (docs/guidance.md).
    """

    summary: ClassVar[str] = "Steers towards a class that a classifier sees in the denoised image."
    source: ClassVar[str] = "Ma et al., arXiv 2310.11311, section 4."
    shows: ClassVar[Literal["denoised", "noisy"]] = "denoised"
    name: Literal["elucd"] = "elucd"
    target: Target = Field(default={})
    joint_temperature: float = Field(
        default=1.0, ge=0, le=10, description="T1: weight of the target's logit."
    )
    marginal_temperature: float = Field(
        default=0.5, ge=0, le=10, description="T2: weight of the other logits."
    )
    gamma: float = Field(
        default=0.3, ge=0, le=10, description="Extra strength in the middle of the diffusion."
    )

    @property
    @override
    def aims(self) -> Mapping[str, str]:
        return self.target

    @override
    def strengths(self, levels: DiffusionLevels) -> NDArray[np.float64]:
        middle = np.sin(np.pi * levels.time) / levels.variance
        return super().strengths(levels) * (1 + self.gamma * middle)

    @classmethod
    @override
    def parameters(  # pyright: ignore[reportIncompatibleMethodOverride] - Self narrows with it
        cls, settings: Sequence[Self], like: Tensor
    ) -> Mapping[str, Tensor]:
        return {
            "joint": numbers_like(like, [one.joint_temperature for one in settings]),
            "marginal": numbers_like(like, [one.marginal_temperature for one in settings]),
        }

    @classmethod
    @override
    def objective(
        cls,
        logits: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        joint, marginal = parameters["joint"], parameters["marginal"]
        total = joint.new_zeros(joint.shape)
        for attribute, seen in logits.items():
            aimed = targets[attribute]
            own = seen.gather(1, aimed.clamp(min=0)[:, None])[:, 0]
            against = (marginal[:, None] * seen).logsumexp(1)
            total = total + (joint * own - against) * (aimed != UNAIMED)
        return total

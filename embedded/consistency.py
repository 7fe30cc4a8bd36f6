"""The mathematics of latent consistency distillation (Luo et al., arXiv 2310.04378).

Times are whole timesteps of training; -1 means a clean picture, where alpha is 1 and sigma 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from samplers.lcm import SIGMA_DATA, TIMESTEP_SCALING

Model = Callable[[Tensor, Tensor], Tensor]
"""Maps x and timesteps to v."""


@dataclass(frozen=True, slots=True)
class AlphaSigma:
    """Alpha and sigma at every time from -1 on, each ``[timesteps + 1]`` float32."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor, device: str) -> "AlphaSigma":
        """Create from the squares of alpha at timesteps 0, 1, ..."""
        squares = torch.cat([torch.ones(1), alphas_cumprod]).double()
        return cls(
            squares.sqrt().float().to(device), (1 - squares).clamp(min=0).sqrt().float().to(device)
        )

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at these times ``[rows]``, each ``[rows, 1, 1, 1]``."""
        alpha, sigma = self.alpha[times + 1], self.sigma[times + 1]
        return alpha[:, None, None, None], sigma[:, None, None, None]


def consistency(v: Tensor, x: Tensor, times: Tensor, levels: AlphaSigma) -> Tensor:
    """The consistency function: the clean picture implied by v, and x itself where t is 0.

    c_skip(t) x + c_out(t) (alpha x - sigma v), with sigma_data .5 and timesteps scaled by 10
    (equation 9, and the boundary of Song et al., arXiv 2303.01469).
    """
    alpha, sigma = levels.at(times)
    scaled = TIMESTEP_SCALING * times.clamp(min=0)[:, None, None, None].float()
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total * x + scaled / total.sqrt() * (alpha * x - sigma * v)


def ddim(v: Tensor, x: Tensor, times: Tensor, following: Tensor, levels: AlphaSigma) -> Tensor:
    """One DDIM step from ``times`` to ``following``; x does not change where both are equal."""
    alpha, sigma = levels.at(times)
    next_alpha, next_sigma = levels.at(following)
    return next_alpha * (alpha * x - sigma * v) + next_sigma * (sigma * x + alpha * v)


def guided(unet: UNet2DConditionModel, empty: Tensor, text: Tensor, scales: Tensor) -> Model:
    """The U-Net with classifier-free guidance, with both predictions in one call.

    Args:
        unet: U-Net that predicts v.
        empty: text states of the empty caption, ``[1, tokens, features]``.
        text: text states of each row's caption, ``[rows, tokens, features]``.
        scales: guidance scales, ``[rows]``; 1 is the caption alone.
    """
    both = torch.cat([empty.expand_as(text), text])
    weights = scales[:, None, None, None]

    def model(x: Tensor, times: Tensor) -> Tensor:
        v = unet(x.repeat(2, 1, 1, 1), times.repeat(2), both, return_dict=False)[0]
        without, with_text = v.float().chunk(2)
        return without + weights * (with_text - without)

    return model


def solved(
    teacher: Model, x: Tensor, times: Tensor, span: int, steps: int, levels: AlphaSigma
) -> tuple[Tensor, Tensor]:
    """Follow the teacher's probability-flow ODE from these times for ``span`` timesteps.

    Args:
        teacher: guided teacher.
        x: state at the start, ``[rows, C, h, w]``.
        times: times at the start, ``[rows]``.
        span: total number of timesteps to go down; rows that reach the clean picture stay there.
        steps: number of equal DDIM steps into which the span is divided.
        levels: levels of the model.

    Returns:
        x at the end, and the times that were reached.
    """
    for _ in range(steps):
        following = (times - span // steps).clamp(min=-1)
        x = ddim(teacher(x, times.clamp(min=0)), x, times, following, levels)
        times = following
    return x, times


def distance(one: Tensor, other: Tensor, kind: Literal["cauchy", "huber"], width: float) -> Tensor:
    """A robust distance of predictions ``[rows, C, h, w]``, so that a few cells do not dominate.

    The Cauchy loss log(1 + d^2 / (2 width^2)) is even more tolerant of outliers than the
    pseudo-Huber loss sqrt(d^2 + width^2) - width (Dao et al., arXiv 2502.01441). d^2 is the mean
    square over the channels of a latent cell, and the result is the mean over cells and rows.
    """
    square = (one - other).square().mean(1)
    if kind == "cauchy":
        return torch.log1p(square / (2 * width**2)).mean()
    return ((square + width**2).sqrt() - width).mean()

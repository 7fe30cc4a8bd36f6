"""Complete runs of the model with classifier-free guidance, many images at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from samplers import Plan, integrate, preconditioning
from server.engine.state.noise import stage_noise, start_noise
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from server.models.conditioning import Conditioning
    from server.models.hosted import HostedModel

IMAGES_AT_ONCE = 32


class GuidedRuns:
    """Complete runs in which image i has prompt i and seed i.

    Everything is float32, as in the server; tables are rounded to it once.

    Args:
        model: the model.
        prompts: prompt of each image.
        shape: shape of a latent, ``(C, h, w)``.
    """

    def __init__(
        self, model: HostedModel, prompts: Sequence[str], shape: tuple[int, int, int]
    ) -> None:
        self._model = model
        self._shape = shape
        with torch.inference_mode():
            size = model.facts.default_width, model.facts.default_height
            *self._prompts, self._unconditional = model.encode_prompts([*prompts, None], *size)

    def run(self, plan: Plan, scale: float) -> Tensor:
        """Final latents of each image, ``[images, C, h, w]``."""
        with torch.inference_mode():
            parts = range(0, len(self._prompts), IMAGES_AT_ONCE)
            return torch.cat([self._run(plan, scale, first) for first in parts])

    def _run(self, plan: Plan, scale: float, first: int) -> Tensor:
        prompts = self._prompts[first : first + IMAGES_AT_ONCE]
        seeds = range(first, first + len(prompts))
        start = torch.stack([start_noise(seed, self._shape) for seed in seeds])
        return integrate(
            plan,
            self._denoiser(plan, prompts, scale),
            plan.start_scale * start.to(self._model.device),
            lambda stage: torch.stack([stage_noise(seed, stage, self._shape) for seed in seeds]),
        )

    def _denoiser(
        self, plan: Plan, prompts: Sequence[Conditioning], scale: float
    ) -> Callable[[Tensor, float], Tensor]:
        facts = self._model.facts
        scalars = preconditioning(facts.prediction, plan.alpha[:-1], plan.sigma[:-1])
        stages = iter(np.stack(scalars, axis=1).tolist())
        other = [] if scale == 1 else [self._unconditional] * len(prompts)
        inputs = RowInputs(self._model.stack([*prompts, *other]))

        def denoise(x: Tensor, t: float) -> Tensor:
            scale_in, skip, out = next(stages)
            both = x if scale == 1 else torch.cat([x, x])
            conditioning = float(self._model.network_time(np.array(t)))
            times = x.new_full((len(both),), conditioning)
            denoised = skip * both + out * self._model.evaluate(scale_in * both, times, inputs)
            if scale == 1:
                return denoised
            cond, other = denoised.chunk(2)
            return cond + (scale - 1) * (cond - other)

        return denoise

"""Empirical model statistics of a hosted model: from pictures and prompts to files beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers import Statistics, preconditioning
from samplers.model_statistics import Mixture, Progress, along_time, compute_statistics
from server.models.folder import DERIVED
from server.models.hosted import HostedModel

__all__ = ["Samples", "Size", "file_of", "make_statistics", "mixture_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Clean latents ``[K, C, h, w]`` float32, and the prompt of each."""

    latents: Tensor
    prompts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is computed.

    Attributes:
        points: in lam.
        samples: K, noised samples at each point.
        chunk: samples in one forward.
        seed: of noise and signs.
    """

    points: int
    samples: int
    chunk: int = 16
    seed: int = 0


def file_of(folder: Path, rule: str, scale: float) -> Path:
    """Where a model folder keeps the statistics of a guidance rule and scale."""
    name = f"ems-{rule}" if rule == "none" else f"ems-{rule}-{scale:g}"
    return folder / DERIVED / f"{name}.safetensors"


def mixture_of(scale: float) -> Mixture:
    """Classifier-free guidance as a sum of the prompt's and the unconditional's prediction.

    Args:
        scale: 1 is no guidance.
    """
    return Mixture("none" if scale == 1 else "cfg", scale, (scale, 1 - scale))


def make_statistics(
    model: HostedModel,
    samples: Samples,
    scales: Sequence[float],
    size: Size,
    *,
    checkpoint: Path | None = None,
    tell: Callable[[Progress], None] | None = None,
) -> list[Statistics]:
    """Statistics of a model at some guidance scales, which share most of the cost.

    Args:
        model: hosted in float32; it can serve no requests afterwards as fast as before.
        samples: real pictures' latents, at least ``size.samples``.
        scales: of classifier-free guidance; 1 for none.
        size: how much is computed.
        checkpoint: see ``samplers.compute_statistics``.
        tell: likewise.

    Raises:
        ValueError: too few samples, or see ``samplers.compute_statistics``.
    """
    if len(samples.prompts) < size.samples:
        raise ValueError(
            f"samples is {size.samples}, and there are only {len(samples.prompts)} pictures."
        )
    model.make_differentiable()
    mixtures = [mixture_of(scale) for scale in scales]
    if all(scale == 1 for scale in scales):
        mixtures = [Mixture()]
    return compute_statistics(
        _denoisers(model, samples.prompts, branches=len(mixtures[0].weights)),
        model.facts.schedule,
        samples.latents,
        count=size.samples,
        points=size.points,
        model=model.facts.revision,
        mixtures=mixtures,
        chunk=size.chunk,
        seed=size.seed,
        checkpoint=checkpoint,
        tell=tell,
    )


def _denoisers(
    model: HostedModel, prompts: Sequence[str], branches: int
) -> Callable[[range], Callable[[Tensor, Tensor], Tensor]]:
    """The denoiser of some samples, each under its prompt; and unconditional as second branch."""
    schedule, prediction = model.facts.schedule, model.facts.prediction

    def scalars(t: np.ndarray) -> np.ndarray:
        scales = preconditioning(prediction, *schedule.level(t))
        return np.stack([schedule.conditioning(t), *scales])

    with torch.no_grad():
        unconditional = model.encode_prompts([""])

    def denoiser_of(rows: range) -> Callable[[Tensor, Tensor], Tensor]:
        with torch.no_grad():
            told = [model.encode_prompts([prompts[k] for k in rows])]
        told.extend([unconditional.expand_as(told[0])] * (branches - 1))
        conditioning = torch.cat(told)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            network_t, *factors = along_time(schedule, scalars, t)
            scale_in, skip, out = (factor[:, None, None, None] for factor in factors)
            raw = model.evaluate(
                (scale_in * x).repeat(branches, 1, 1, 1), network_t.repeat(branches), conditioning
            )
            return skip * x + out * raw.view(branches, *x.shape)

        return denoise

    return denoiser_of

"""Empirical model statistics of a hosted model, from pictures and prompts to files beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers import Statistics, preconditioning
from samplers.model_statistics import (
    Mixture,
    SamplesDone,
    along_time,
    compute_statistics,
    drop_checkpoint,
)
from server.errors import InvalidRequest
from server.fitting.samples import Samples, draw, prompts_for, read_pictures
from server.models.folder import statistics_file
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.output_files import check_name

__all__ = ["Order", "Size", "make_statistics", "mixture_of", "run_order"]


@dataclass(frozen=True, slots=True)
class Size:
    """The amount of computation.

    Attributes:
        points: number of points in lam.
        samples: K, the number of noised samples at each point.
        chunk: number of samples in one forward pass.
        seed: seed of noise and signs.
    """

    points: int
    samples: int
    chunk: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """An order from the command line.

    Attributes:
        folder: folder of the model.
        scales: scales of classifier-free guidance; 1 for none.
        size: amount of computation.
        device: device to compute on.
        data: folder of pictures with captions; without it the model draws its own samples.
        prompts: file with one prompt per line, for these samples.
        steps: number of steps of the sampler that draws them.
        out: output file for a single scale; by default each has its place in the model's folder.
    """

    folder: Path
    scales: Sequence[float]
    size: Size
    device: str = "auto"
    data: Path | None = None
    prompts: Path | None = None
    steps: int = 25
    out: Path | None = None


def run_order(order: Order, on_progress: Callable[[str, int, int], None]) -> list[Path]:
    """Make statistics files, resuming an interrupted run.

    Args:
        order: order from the command line.
        on_progress: callback for progress, called with the name of the stage, the number done, and
            the total.

    Returns:
        The files, in the order of the scales.

    Raises:
        WeftError: the order cannot be fulfilled, with a sentence for the user.
    """
    files = _files(order)
    model = load_model(order.folder, name=order.folder.name, device=order.device, dtype="float32")
    samples = _samples(model, order, on_progress)
    checkpoint = files[0].with_suffix(".sums")
    try:
        made = make_statistics(
            model,
            samples,
            order.scales,
            order.size,
            checkpoint=checkpoint,
            on_progress=lambda progress: on_progress("statistics", progress.done, progress.total),
        )
    except ValueError as refusal:
        raise InvalidRequest(None, str(refusal)) from None
    for file, statistics in zip(files, made, strict=True):
        statistics.save(file)
    drop_checkpoint(checkpoint)
    return files


def mixture_of(scale: float) -> Mixture:
    """Classifier-free guidance as a sum of the prompt's and the unconditional prediction.

    Args:
        scale: guidance scale; 1 is no guidance.
    """
    return Mixture("none" if scale == 1 else "cfg", scale, (scale, 1 - scale))


def make_statistics(
    model: HostedModel,
    samples: Samples,
    scales: Sequence[float],
    size: Size,
    *,
    checkpoint: Path | None = None,
    on_progress: Callable[[SamplesDone], None] | None = None,
) -> list[Statistics]:
    """Compute statistics of a model at some guidance scales, which share most of the cost.

    Args:
        model: model hosted in float32; it may be slower afterwards.
        samples: samples of its data, ``size.samples`` of them.
        scales: scales of classifier-free guidance; 1 for none.
        size: amount of computation.
        checkpoint: see ``samplers.compute_statistics``.
        on_progress: see ``samplers.compute_statistics``.

    Raises:
        ValueError: see ``samplers.compute_statistics``.
    """
    model.make_differentiable()
    mixtures = [mixture_of(scale) for scale in scales]
    if all(scale == 1 for scale in scales):
        mixtures = [Mixture()]
    return compute_statistics(
        _denoisers(model, samples.prompts, branches=len(mixtures[0].weights)),
        model.default_schedule,
        samples.latents,
        count=size.samples,
        points=size.points,
        model=model.facts.denoiser,
        mixtures=mixtures,
        chunk=size.chunk,
        seed=size.seed,
        checkpoint=checkpoint,
        tell=on_progress,
    )


def _files(order: Order) -> list[Path]:
    if order.out is None:
        return [
            statistics_file(order.folder, mixture_of(scale).rule, scale) for scale in order.scales
        ]
    if len(order.scales) > 1:
        raise InvalidRequest("out", "out names one file; leave it out, or give one scale.")
    check_name("out", order.out)
    return [order.out]


def _samples(
    model: HostedModel, order: Order, on_progress: Callable[[str, int, int], None]
) -> Samples:
    count, chunk = order.size.samples, order.size.chunk
    if order.data is not None:
        return read_pictures(model, order.data, count, chunk)
    return draw(
        model,
        prompts_for(order.folder, order.prompts),
        count,
        scale=min(order.scales),
        steps=order.steps,
        chunk=chunk,
        on_progress=lambda done: on_progress("samples", done, count),
    )


def _denoisers(
    model: HostedModel, prompts: Sequence[str], branches: int
) -> Callable[[range], Callable[[Tensor, Tensor], Tensor]]:
    """Denoiser for some samples, each with its prompt, and unconditional as a second branch."""
    schedule, prediction = model.default_schedule, model.facts.prediction

    def scalars(t: np.ndarray) -> np.ndarray:
        scales = preconditioning(prediction, *schedule.level(t))
        return np.stack([model.network_time(t), *scales])

    def denoiser_of(rows: range) -> Callable[[Tensor, Tensor], Tensor]:
        texts = [*(prompts[k] for k in rows), *[None] * (len(rows) * (branches - 1))]
        with torch.no_grad():
            inputs = model.inputs(texts)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            network_t, *factors = along_time(schedule, scalars, t)
            scale_in, skip, out = (factor[:, None, None, None] for factor in factors)
            raw = model.evaluate(
                (scale_in * x).repeat(branches, 1, 1, 1), network_t.repeat(branches), inputs
            )
            return skip * x + out * raw.view(branches, *x.shape)

        return denoise

    return denoiser_of

"""Encoded images of a generation, each with the settings that make it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.image_codec import ImageText, encode
from server.models.hosted import HostedModel
from server.requests.checks.group import is_group
from server.requests.infotext import infotext
from server.requests.tasks import alone
from server.service.generation import Generation

__all__ = ["Picture", "Pictures", "encoded", "pictures_of"]

VERSION = f"weft {version('weft')}"


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image.

    Attributes:
        data: content of the file.
        seed: seed that makes it.
        text: its settings in the format of AUTOMATIC1111, which the file contains too.
    """

    data: bytes
    seed: int
    text: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of a generation, and how they were made.

    Attributes:
        pictures: the images in the order of their seeds.
        settings: settings with every default filled in; posted back, they make the same images.
        spent: number of evaluations of the denoiser, summed over the images.
        saved: number of evaluations that guidance policies and step caches made unnecessary.
        ancestors: for particles, the image that each descends from; otherwise empty.
        effective: for particles, their effective number at each resampling.
        queue_s: longest waiting time of an image.
        denoise_s: longest denoising time of an image.
        decode_s: longest decoding time of an image.
        total_s: seconds from the request's arrival to the last encoded byte.
        warnings: one sentence for each setting that has no effect or does not suit the model.
        notes: one sentence about the settings that a distilled model's convention chose.
    """

    pictures: tuple[Picture, ...]
    settings: Mapping[str, Any]
    spent: int
    saved: int
    ancestors: tuple[int, ...]
    effective: tuple[float, ...]
    queue_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


async def pictures_of(generation: Generation, model: HostedModel) -> Pictures:
    """Encode the images of a generation, and complete it.

    Args:
        generation: generation whose images are all finished.
        model: model that made them.

    Raises:
        WeftError: an image failed, or the generation was cancelled.
    """
    indices = range(generation.request.n)
    pixels = {index: generation.results[index].pixels for index in indices}
    written = await encoded(generation, model, pixels)
    generation.complete()
    results = generation.results.values()
    particles = generation.request.guidance.particles is not None
    return Pictures(
        pictures=written,
        settings=generation.request.settings(),
        spent=sum(result.evaluations for result in results),
        saved=sum(result.saved for result in results),
        ancestors=tuple(generation.results[i].ancestor for i in indices) if particles else (),
        effective=generation.results[0].effective,
        queue_s=max(result.queue_s for result in results),
        denoise_s=max(result.denoise_s for result in results),
        decode_s=max(result.decode_s for result in results),
        total_s=generation.elapsed_s,
        warnings=generation.warnings,
        notes=generation.notes,
    )


async def encoded(
    generation: Generation, model: HostedModel, pixels: Mapping[int, NDArray[np.uint8]]
) -> tuple[Picture, ...]:
    """Encode pixels as images of a generation, with the settings that make them.

    Args:
        generation: admitted generation.
        model: model that made its images.
        pixels: uint8 `[H, W, 3]` of each image by its index.
    """
    written = await asyncio.gather(
        *(
            asyncio.to_thread(_encoded, generation, model, index, pixels[index])
            for index in sorted(pixels)
        )
    )
    return tuple(written)


def _encoded(
    generation: Generation, model: HostedModel, index: int, pixels: NDArray[np.uint8]
) -> Picture:
    request = generation.request
    single = alone(request, index)
    # An image of a group cannot be made without the others.
    written = request if is_group(request.guidance) else single
    text = infotext(
        written,
        model_revision=generation.model_revision,
        statistics=generation.statistics,
        version=VERSION,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.placement.quantization,
        weighs_prompts=model.weighs_prompts,
    )
    description = ImageText(text, written.settings())
    return Picture(encode(pixels, request.output_format, description), single.seed, text)

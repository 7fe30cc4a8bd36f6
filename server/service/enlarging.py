"""Enlarging of a first run's result to the size of the second: pixels by Lanczos, or latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from server.engine.state.sequence import ImageResult
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.requests.hires import Upscaler
from server.service.pixels import pixels_tensor
from server.service.second_run import Started

__all__ = ["enlarged", "enlarged_latents", "started_from"]


class Interpolation(NamedTuple):
    """Arguments of ``torch.nn.functional.interpolate``."""

    mode: str
    antialias: bool = False


OF_LATENTS: Final[Mapping[Upscaler, Interpolation]] = MappingProxyType(
    {
        "latent": Interpolation("bilinear"),
        "latent_antialiased": Interpolation("bilinear", antialias=True),
        "latent_bicubic": Interpolation("bicubic"),
        "latent_bicubic_antialiased": Interpolation("bicubic", antialias=True),
        "latent_nearest": Interpolation("nearest"),
        "latent_nearest_exact": Interpolation("nearest-exact"),
    }
)
"""Modes by which AUTOMATIC1111 enlarges latents (modules/shared_items.py,
``latent_upscale_modes``)."""


def started_from(upscaler: Upscaler, model: HostedModel) -> Started:
    """Return the function that makes a task of the second run start from the first run's result.

    Args:
        upscaler: upscaler of the first run's pixels, or of its latents, which are then not decoded.
        model: model of both runs.
    """

    def from_latents(task: ImageTask, first: ImageResult) -> ImageTask:
        if first.latents is None:
            raise ValueError("the first run was decoded")
        size = model.latent_shape(task.width, task.height)[1:]
        return replace(task, latents=enlarged_latents(first.latents, size, upscaler))

    def from_pixels(task: ImageTask, first: ImageResult) -> ImageTask:
        return replace(task, image=pixels_tensor(enlarged(first.pixels, task.width, task.height)))

    return from_latents if upscaler in OF_LATENTS else from_pixels


def enlarged(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Enlarge a picture, cropped around its middle to other proportions.

    Args:
        pixels: uint8 `[h, w, 3]`.
        width: width of the result.
        height: height of the result.
    """
    image = Image.fromarray(pixels, mode="RGB")
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def enlarged_latents(latents: Tensor, size: tuple[int, int], upscaler: Upscaler) -> Tensor:
    """Enlarge latents, cropped around their middle to other proportions.

    Args:
        latents: float32 `[C, h, w]`.
        size: height and width of the result in cells.
        upscaler: upscaler for latents.
    """
    (high, wide), (h, w) = size, latents.shape[1:]
    covering = (wide * h // w, wide) if wide * h >= high * w else (high, high * w // h)
    mode, antialias = OF_LATENTS[upscaler]
    larger = F.interpolate(latents[None], covering, mode=mode, antialias=antialias)[0]
    top, left = (covering[0] - high) // 2, (covering[1] - wide) // 2
    return larger[:, top : top + high, left : left + wide].contiguous()

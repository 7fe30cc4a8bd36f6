"""The models that benchmarks run on, in the form that each system needs.

    python -m benchmarks.architectures sd15 FOLDER --device cuda

writes one of them as a model folder, for benchmarks that start a server on it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.random_models import sd15, sdxl, z_image
from embedded import MODEL_FOLDER
from server.models.loading import choose_device, choose_dtype, load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.models.hosted import HostedModel

__all__ = ["ARCHITECTURES", "RANDOM", "Architecture", "build", "write"]

RANDOM: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "z_image": z_image,
    "tiny_sdxl": partial(sdxl, tiny=True),
    "tiny_z_image": partial(z_image, tiny=True),
}
"""Sizes of published models with random weights, and tiny ones for trying a benchmark."""

ARCHITECTURES = ("embedded", *RANDOM)

IN_BFLOAT16 = ("z_image",)
"""What overflows in float16."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model, hosted by Weft and as diffusers' pipeline, with the same weights.

    Attributes:
        hosted: for the engine.
        pipeline: diffusers'.
        side: width and height of the pictures in pixels.
    """

    hosted: HostedModel
    pipeline: Any
    side: int

    @property
    def denoiser(self) -> Any:
        """The pipeline's U-Net or transformer."""
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer


def build(architecture: str, device: str, dtype: str) -> Architecture:
    """A model by its name in ``ARCHITECTURES``.

    Args:
        architecture: the name.
        device: as the server's setting.
        dtype: as the server's setting; ``auto`` is half precision on a GPU.
    """
    with TemporaryDirectory() as temporary:
        folder = MODEL_FOLDER
        if architecture in RANDOM:
            folder = Path(temporary)
            write(architecture, folder, device, dtype)
        hosted = load_model(folder, name="model", device=device, dtype=dtype)
        pipeline = _pipeline(folder, hosted)
    return Architecture(hosted, pipeline, hosted.facts.default_width)


def write(architecture: str, folder: Path, device: str, dtype: str) -> None:
    """Write a model of random weights as a model folder.

    Args:
        architecture: its name in ``ARCHITECTURES``, but not the embedded model.
        folder: to write.
        device: where the weights are drawn.
        dtype: that they are kept in.
    """
    place = choose_device(device)
    half = torch.bfloat16 if architecture in IN_BFLOAT16 else torch.float16
    pipeline = RANDOM[architecture](place, choose_dtype(dtype, place, half))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)


def _pipeline(folder: Path, hosted: HostedModel) -> Any:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=hosted.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(hosted.device)


def main() -> None:
    """Write a model folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument("architecture", choices=RANDOM)
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--device", default="auto", help="where random weights are drawn")
    parser.add_argument("--dtype", default="auto", help="that they are kept in")
    options = parser.parse_args()
    write(options.architecture, options.folder, options.device, options.dtype)


if __name__ == "__main__":
    main()

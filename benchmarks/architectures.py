"""The models that benchmarks run on, in the form that each system needs.

    python -m benchmarks.architectures sd15 FOLDER --device cuda

writes one of them as a model folder, for benchmarks that start a server on it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.random_models import sd15, sdxl, z_image
from embedded import MODEL_FOLDER
from server.models.loading import choose_device, choose_dtype, load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.models.hosted import HostedModel

__all__ = ["ARCHITECTURES", "RANDOM", "Architecture", "build", "write"]

RANDOM: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "sd15": sd15,
    "sd15_taesd": partial(sd15, taesd=True),
    "sdxl": sdxl,
    "z_image": z_image,
    "tiny_sdxl": partial(sdxl, tiny=True),
    "tiny_z_image": partial(z_image, tiny=True),
}
"""Sizes of published models with random weights, and tiny ones for trying a benchmark."""

ARCHITECTURES = ("embedded", *RANDOM)

IN_BFLOAT16 = ("z_image",)
"""Architectures that overflow in float16."""


MAX_SHARED_MEMORY_FRACTION = 0.5
"""Maximum fraction of its free bytes that the files of a model may use."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files in it have names of their own


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model, hosted by Weft and as diffusers' pipeline, with the same weights.

    The two do not share modules, so that Weft's changes to its own, such as another memory format,
    do not affect the pipeline.

    Attributes:
        hosted: the model as hosted by Weft, for its engine.
        pipeline: diffusers' pipeline.
        side: width and height of the pictures in pixels.
    """

    hosted: HostedModel
    pipeline: Any
    side: int

    @property
    def denoiser(self) -> Any:
        """The pipeline's U-Net or transformer."""
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer


def build(
    architecture: str, device: str, dtype: str, say: Callable[[str], None] = lambda _: None
) -> Architecture:
    """Build a model by its name in ``ARCHITECTURES``.

    Args:
        architecture: name of the model.
        device: device, as in the server's setting.
        dtype: dtype, as in the server's setting; ``auto`` is half precision on a GPU.
        say: called with progress messages.
    """
    if architecture not in RANDOM:
        hosted = load_model(MODEL_FOLDER, name="model", device=device, dtype=dtype)
        pipeline = _pipeline(MODEL_FOLDER, hosted)
        return Architecture(hosted, pipeline, hosted.facts.default_width)
    pipeline = _random(architecture, device, dtype)
    say("random weights drawn")
    parameters: Any = chain.from_iterable(
        part.parameters() for part in pipeline.components.values() if isinstance(part, nn.Module)
    )
    with TemporaryDirectory(dir=_place(sum(one.nbytes for one in parameters))) as temporary:
        # Written and read only once: the pipeline is the one that was just created.
        pipeline.save_pretrained(temporary)
        say("weights written")
        hosted = load_model(Path(temporary), name="model", device=device, dtype=dtype)
        say("model hosted")
    return Architecture(hosted, pipeline, hosted.facts.default_width)


def write(architecture: str, folder: Path, device: str, dtype: str) -> None:
    """Write a model with random weights as a model folder.

    Args:
        architecture: name in ``ARCHITECTURES``, except the embedded model.
        folder: folder to write.
        device: device on which the weights are drawn.
        dtype: dtype in which they are stored.
    """
    _random(architecture, device, dtype).save_pretrained(folder)


def _random(architecture: str, device: str, dtype: str) -> Any:
    place = choose_device(device)
    half = torch.bfloat16 if architecture in IN_BFLOAT16 else torch.float16
    pipeline = RANDOM[architecture](place, choose_dtype(dtype, place, half))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _place(nbytes: int) -> Path | None:
    """Folder for temporary files of this many bytes; None for the system's default."""
    try:
        free = disk_usage(SHARED_MEMORY).free
    except OSError:
        return None
    return SHARED_MEMORY if nbytes <= MAX_SHARED_MEMORY_FRACTION * free else None


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

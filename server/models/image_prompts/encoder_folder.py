"""Image encoders in folders beside IP-Adapters: the config is read first, weights on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from server.errors import ImagePromptMismatch, ModelMismatch
from server.models.folder import (
    HERE,
    about_folder,
    joint_stamp,
    read_json,
    stamp_of,
    without_folder,
)
from server.models.image_prompts.image_prompt import ImageEncoder
from server.models.own_memory import copy_to_own_memory
from server.models.parts import build_encoder
from server.models.weight_files import TEXT_ENCODER, bytes_of_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from server.models.image_prompts.image_prompt import Kind

__all__ = ["EncoderFolder", "encoder_paths", "subfolders"]

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
CLASS = "CLIPVisionModelWithProjection"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of CLIP's training images, used where a folder specifies none."""

MAX_SIDE = 1024
"""Maximum height and width of input images in pixels; published encoders have 224 or 336."""


@dataclass(frozen=True, slots=True, eq=False)
class EncoderFolder:
    """A folder with an image encoder.

    Attributes:
        path: path of the folder.
        stamp: value that changes when its files change.
        side: height and width of its input images, in pixels.
        widths: number of output features, by the kind of adapter that reads them.
        mean: mean of each channel, for values from 0 to 1, subtracted from input images.
        std: standard deviation of each channel, by which input images are then divided.
    """

    path: Path
    stamp: tuple[int, int]
    side: int
    widths: dict[Kind, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> EncoderFolder | None:
        """Read the config of a folder; None if it does not describe an image encoder.

        Raises:
            ImagePromptMismatch: it cannot be read, or lacks required entries.
        """
        try:
            config = read_json(path, CONFIG)
            shown = read_json(path, PREPROCESSOR) if (path / PREPROCESSOR).is_file() else {}
        except ModelMismatch as error:
            raise _refused(path, error) from None
        if config.get("architectures") != [CLASS]:
            return None
        entries = [config.get(entry) for entry in ("image_size", "projection_dim", "hidden_size")]
        sizes = [entry for entry in entries if type(entry) is int and entry > 0]
        if len(sizes) < len(entries) or sizes[0] > MAX_SIDE:
            raise ImagePromptMismatch(
                f"{CONFIG} of image encoder {path.name!r} must have the whole numbers image_size, "
                f"at most {MAX_SIDE}, projection_dim and hidden_size."
            )
        side, projected, hidden = sizes
        mean, std = shown.get("image_mean", MEAN), shown.get("image_std", STD)
        if not _is_color(mean) or not _is_color(std) or not all(std):
            raise ImagePromptMismatch(
                f"{PREPROCESSOR} of image encoder {path.name!r} must have three numbers as "
                "image_mean, and three other than 0 as image_std."
            )
        stamp = _stamp(path)
        return cls(path, stamp, side, {"plain": projected, "plus": hidden}, tuple(mean), tuple(std))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of the loaded weights in bytes, computed from the headers of its files.

        Raises:
            ImagePromptMismatch: they cannot be read.
        """
        try:
            needed = bytes_of_part(self.path, HERE, TEXT_ENCODER, dtype.itemsize)
        except ModelMismatch as error:
            raise _refused(self.path, error) from None
        if not needed:
            raise ImagePromptMismatch(
                f"image encoder {self.path.name!r} has no {TEXT_ENCODER}.safetensors with weights."
            )
        return needed

    def load(self, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        """Load the weights.

        Raises:
            ImagePromptMismatch: the files do not match the config.
        """
        from transformers import CLIPVisionModelWithProjection

        try:
            network: Any = build_encoder(self.path, HERE, CLIPVisionModelWithProjection, dtype)
        except ModelMismatch as error:
            raise _refused(self.path, error) from None
        except Exception as error:
            reason = without_folder(error, self.path).partition("\n")[0].rstrip(".")
            raise ImagePromptMismatch(
                f"image encoder {self.path.name!r} is not understood: {reason}."
            ) from error
        copy_to_own_memory(network, device)
        mean, std = (torch.tensor(one).view(3, 1, 1).to(device) for one in (self.mean, self.std))
        return ImageEncoder(network.to(device), mean, std, self.nbytes(dtype))


def subfolders(folder: Path) -> Sequence[Path]:
    """Subfolders in sorted order; empty if the folder cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return ()


def encoder_paths(folders: Iterable[Path]) -> Iterator[tuple[Path, tuple[int, int]]]:
    """The folders that may hold an image encoder, each with the stamp of its files."""
    for path in folders:
        if (path / CONFIG).is_file():
            yield path, _stamp(path)


def _stamp(path: Path) -> tuple[int, int]:
    """Time of the last change to an encoder's files, and their total size in bytes."""
    files = (path / CONFIG, path / PREPROCESSOR, *path.glob("*.safetensors"))
    return joint_stamp(map(stamp_of, files))


def _is_color(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(type(one) in (int, float) for one in value)
    )


def _refused(path: Path, error: ModelMismatch) -> ImagePromptMismatch:
    return ImagePromptMismatch(about_folder(error, path, f"image encoder {path.name!r}"))

"""ControlNets in folders: the config first, weights once somebody asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from server.errors import ControlMismatch, ModelMismatch, Overloaded
from server.models.controls.control import Control
from server.models.folder import read_json, stamp_of
from server.models.memory import measure
from server.models.parts import build_network
from server.models.weight_files import NETWORK, bytes_of_part

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from server.models.controls.control_kind import ControlKind

__all__ = ["CONFIG", "ControlFolder"]

CONFIG = "config.json"
HERE = "."
"""The folder itself, where a model's parts are in subfolders."""

FULL_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class ControlFolder:
    """A folder with a ControlNet that fits a model.

    Attributes:
        name: as requests say it.
        path: of the folder.
        stamp: by which a change of its files is noticed.
        kind: the model's.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    kind: ControlKind

    @classmethod
    def read(cls, path: Path, model: str, kind: ControlKind) -> ControlFolder:
        """Read the config of a folder, and see whether it fits a model.

        Args:
            path: of the folder, whose name is the ControlNet's.
            model: name of the model.
            kind: what it takes.

        Raises:
            ControlMismatch: it does not; the sentence names both.
        """
        name, stamp = path.name, folder_stamp(path)
        try:
            config = read_json(path, CONFIG)
        except ModelMismatch as error:
            raise _refused(name, path, error) from None
        of, wanted = str(config.get("_class_name"))[:80], kind.kind.__name__
        if of != wanted:
            raise ControlMismatch(
                f"ControlNet {name!r} is a {of}; those of model {model!r} are of {wanted}."
            )
        if differs := kind.misfit(config):
            raise ControlMismatch(
                f"ControlNet {name!r} does not fit model {model!r}: it {differs}."
            )
        return cls(name, path, stamp, kind)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights once they are loaded, in bytes, from the headers of its files.

        Raises:
            ControlMismatch: they cannot be read.
        """
        return self._bytes(dtype.itemsize)

    def cost(self) -> float:
        """What a row of it costs, in rows of the denoiser: the ratio of their weights.

        Raises:
            ControlMismatch: its files cannot be read.
        """
        return self._bytes(1) / _weights(self.kind.denoiser)

    def load(self, device: torch.device, dtype: torch.dtype) -> Control:
        """Read the weights.

        Raises:
            ControlMismatch: the files are not what the config describes.
            Overloaded: they do not fit in what is free of the device's memory.
        """
        needed, free = self.nbytes(dtype), measure(device).free
        if needed > free:
            raise self._no_room(needed, f"of which {free} are free")
        try:
            network: Any = build_network(self.path, HERE, self.kind.kind, dtype)
        except ModelMismatch as error:
            raise _refused(self.name, self.path, error) from None
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ControlMismatch(
                f"ControlNet {self.name!r} is not understood: {reason}."
            ) from error
        try:
            prepared = self.kind.prepared(network)
        except torch.OutOfMemoryError:
            # A tick may have taken since what was free.
            raise self._no_room(needed, "which are not free now") from None
        return Control(self.name, prepared, needed, self.cost())

    def _bytes(self, width: int) -> int:
        """Of its weights at so many bytes a number, from the headers of its files."""
        try:
            return bytes_of_part(self.path, HERE, NETWORK, width)
        except ModelMismatch as error:
            raise _refused(self.name, self.path, error) from None

    def _no_room(self, needed: int, reason: str) -> Overloaded:
        return Overloaded(
            FULL_RETRY_S,
            f"ControlNet {self.name!r} needs {needed} bytes of memory, {reason}; try again in "
            f"{FULL_RETRY_S:.0f} s.",
        )


def folder_stamp(path: Path) -> tuple[int, int]:
    """When a file of a ControlNet was last changed, and the bytes of all its files."""
    stamps = [stamp_of(file) for file in (path / CONFIG, *path.glob("*.safetensors"))]
    return max(changed for changed, _ in stamps), sum(size for _, size in stamps)


def _weights(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def _refused(name: str, path: Path, error: ModelMismatch) -> ControlMismatch:
    """The refusal of a folder, less where it is, which is no client's business."""
    message = error.message.replace(f"model folder {str(path)!r}", f"ControlNet {name!r}")
    return ControlMismatch(message.removeprefix(f"{HERE} of ").replace(f"{HERE}/", ""))

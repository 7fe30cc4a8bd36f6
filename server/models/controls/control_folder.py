"""ControlNets in folders or single files: the config is read first, weights on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from server.errors import ControlMismatch, ModelMismatch
from server.models.controls.control import Control
from server.models.folder import HERE, about_folder, joint_stamp, read_json, stamp_of
from server.models.memory import check_memory_for
from server.models.own_memory import copy_to_own_memory
from server.models.parts import build_network
from server.models.weight_files import NETWORK, bytes_of_part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from server.models.controls.control_kind import ControlKind

__all__ = ["CONFIG", "ControlFolder"]

CONFIG = "config.json"

OTHER_KINDS = {
    "difference": "holds differences from a base model's weights",
    "lora_controlnet": "is a control LoRA",
    "task_embedding": "is a union of several kinds",
}
"""Kinds of single files, by the name of a tensor that they contain and a ControlNet does not."""


@dataclass(frozen=True, slots=True, eq=False)
class ControlFolder:
    """A folder or a single file with a ControlNet that fits a model.

    Attributes:
        name: name that requests use.
        path: path of the folder or the file.
        stamp: value that changes when its files change.
        kind: ControlNets that the model accepts.
        config: config of the network.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    kind: ControlKind
    config: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, path: Path, model: str, kind: ControlKind) -> ControlFolder:
        """Read the config of a ControlNet, and check that it fits a model.

        Args:
            name: name that requests use.
            path: path of the folder or the file.
            model: name of the model.
            kind: ControlNets that the model accepts.

        Raises:
            ControlMismatch: it does not fit; the sentence names both.
        """
        stamp = folder_stamp(path)
        try:
            config = _config_of_file(name, path, model, kind) if path.is_file() else None
            config = config or read_json(path, CONFIG)
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
        return cls(name, path, stamp, kind, config)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of the loaded weights in bytes, computed from the headers of its files.

        Raises:
            ControlMismatch: they cannot be read.
        """
        return self._bytes(dtype.itemsize)

    def cost(self) -> float:
        """Cost of one of its rows, in rows of the denoiser: the ratio of their weights.

        Raises:
            ControlMismatch: its files cannot be read.
        """
        return self._bytes(1) / _weights(self.kind.denoiser)

    def load(self, device: torch.device, dtype: torch.dtype) -> Control:
        """Load the weights.

        Raises:
            ControlMismatch: the files do not match the config.
            Overloaded: they do not fit into the free memory of the device.
        """
        needed = self.nbytes(dtype)
        with check_memory_for(f"ControlNet {self.name!r}", needed, device):
            try:
                network: Any = build_network(
                    *self._folder_and_part, self.kind.kind, dtype, self.config
                )
            except ModelMismatch as error:
                raise _refused(self.name, self.path, error) from None
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise ControlMismatch(
                    f"ControlNet {self.name!r} is not understood: {reason}."
                ) from error
            copy_to_own_memory(network, device)
            prepared = self.kind.prepared(network)
        return Control(self.name, prepared, needed, self.cost())

    @property
    def _folder_and_part(self) -> tuple[Path, str]:
        return (self.path.parent, self.path.name) if self.path.is_file() else (self.path, HERE)

    def _bytes(self, width: int) -> int:
        """Size of its weights at ``width`` bytes per number, from the headers of its files."""
        try:
            return bytes_of_part(*self._folder_and_part, NETWORK, width)
        except ModelMismatch as error:
            raise _refused(self.name, self.path, error) from None


def folder_stamp(path: Path) -> tuple[int, int]:
    """Time of the last change to a ControlNet's files, and their total size in bytes."""
    if path.is_file():
        return stamp_of(path)
    return joint_stamp(map(stamp_of, (path / CONFIG, *path.glob("*.safetensors"))))


def _config_of_file(name: str, path: Path, model: str, kind: ControlKind) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = [*opened.keys()]
    except (OSError, SafetensorError):
        raise ControlMismatch(f"ControlNet {name!r} is not a safetensors file.") from None
    config = kind.config_of_file(tensors)
    if config is None:
        raise ControlMismatch(
            f"ControlNet {name!r} is a single file, but none with a ControlNet of a U-Net, as "
            f"model {model!r} would need: control LoRA, LLLite and T2I-Adapters are not supported, "
            "and the ControlNets of other families are folders in the diffusers layout."
        )
    for tensor, what in OTHER_KINDS.items():
        if tensor in tensors:
            raise ControlMismatch(
                f"ControlNet {name!r} {what} (it has the tensor {tensor}), which is not supported."
            )
    # Only the file name of published files indicates that they average over the image.
    return {**config, "global_pool_conditions": "shuffle" in name.lower()}


def _weights(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def _refused(name: str, path: Path, error: ModelMismatch) -> ControlMismatch:
    folder = path.parent if path.is_file() else path
    return ControlMismatch(about_folder(error, folder, f"ControlNet {name!r}"))

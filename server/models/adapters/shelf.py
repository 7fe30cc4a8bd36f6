"""The adapters available to a model: found in folders by name, loaded on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import AdapterMismatch
from server.models.adapters.adapter import Adapter
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.folder import stamp_of
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from server.models.weight_memory import WeightMemory

__all__ = ["AdapterShelf"]


class AdapterShelf(WeightShelf[AdapterFile, Adapter, Target]):
    """The adapters that fit one model, files ``NAME.safetensors``; see :class:`WeightShelf`.

    Args:
        folders: folders that hold the files.
        target: the model.
        memory: keeps loaded adapters.
        device: device of the model.
        dtype: dtype of its weights.
    """

    what = "adapter"
    asked = "adapters"
    ending = ".safetensors"
    mismatch = AdapterMismatch

    def __init__(
        self,
        folders: Sequence[Path],
        target: Target,
        memory: WeightMemory[Adapter],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folders, target.model, target, memory, device, dtype)

    def _is_one(self, path: Path) -> bool:
        return path.is_file()

    def _stamp(self, path: Path) -> tuple[int, int]:
        return stamp_of(path)

    def _understood(self, name: str, path: Path, wanted: Target) -> AdapterFile:
        return AdapterFile.read(name, path, wanted)

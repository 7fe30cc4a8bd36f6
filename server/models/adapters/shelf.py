"""The adapters available to a model: found in folders by name, loaded on demand."""

from __future__ import annotations

from contextlib import suppress
from os import listdir
from typing import TYPE_CHECKING

from typing_extensions import override

from server.errors import AdapterMismatch
from server.models.adapters.adapter import Adapter
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.peft_config import WEIGHTS, adapter_stamp
from server.models.adapters.placing import Target
from server.models.weight_shelf import NAME, WeightShelf

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from server.models.weight_memory import WeightMemory

__all__ = ["AdapterShelf"]


class AdapterShelf(WeightShelf[AdapterFile, Adapter, Target]):
    """The adapters that fit one model; see :class:`WeightShelf`.

    They are files ``NAME.safetensors``, and folders ``NAME`` that peft saved. Of one name, the file
    counts.

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
        own = path if path.name.endswith(self.ending) else path / WEIGHTS
        return own.is_file()

    def _stamp(self, path: Path) -> tuple[int, int]:
        return adapter_stamp(path)

    def _understood(self, name: str, path: Path, wanted: Target) -> AdapterFile:
        return AdapterFile.read(name, path, wanted)

    @override
    def _listed(self, folder: Path) -> Mapping[str, Path]:
        files = super()._listed(folder)
        with suppress(OSError):
            others = (entry for entry in listdir(folder) if not entry.endswith(self.ending))
            folders = {entry: folder / entry for entry in others if NAME.fullmatch(entry)}
            return {**folders, **files}
        return files

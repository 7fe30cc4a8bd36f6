"""The ControlNets available to a model: found in folders by name, loaded on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from typing_extensions import override

from server.errors import ControlMismatch
from server.models.controls.control import Control
from server.models.controls.control_folder import CONFIG, ControlFolder, folder_stamp
from server.models.controls.control_kind import ControlKind
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ControlShelf"]

FILE: Final = ".safetensors"


class ControlShelf(WeightShelf[ControlFolder, Control, ControlKind]):
    """The ControlNets that fit one model, in folders or single files.

    They are folders ``NAME`` with a ``config.json``, and files ``NAME.safetensors``. If both exist
    for a name, the folder is used.
    """

    what = "ControlNet"
    asked = "ControlNets"
    mismatch = ControlMismatch

    def _is_one(self, path: Path) -> bool:
        return (path / CONFIG).is_file() or (path.suffix == FILE and path.is_file())

    def _stamp(self, path: Path) -> tuple[int, int]:
        return folder_stamp(path)

    def _understood(self, name: str, path: Path, wanted: ControlKind) -> ControlFolder:
        return ControlFolder.read(name, path, self._model, wanted)

    @override
    def _listed(self, folder: Path) -> Mapping[str, Path]:
        entries = super()._listed(folder)
        files = {k.removesuffix(FILE): path for k, path in entries.items() if k.endswith(FILE)}
        return files | {k: path for k, path in entries.items() if not k.endswith(FILE)}

"""The ControlNets that a model may be steered by: found in folders by name, loaded on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import ControlMismatch
from server.models.controls.control import Control
from server.models.controls.control_folder import CONFIG, ControlFolder, folder_stamp
from server.models.controls.control_kind import ControlKind
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ControlShelf"]


class ControlShelf(WeightShelf[ControlFolder, Control, ControlKind]):
    """The ControlNets that fit one model, folders ``NAME`` with a ``config.json``."""

    what = "ControlNet"
    asked = "ControlNets"
    mismatch = ControlMismatch

    def _is_one(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def _stamp(self, path: Path) -> tuple[int, int]:
        return folder_stamp(path)

    def _understood(self, name: str, path: Path, wanted: ControlKind) -> ControlFolder:
        return ControlFolder.read(path, self._model, wanted)

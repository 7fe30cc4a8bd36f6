"""The ControlNets that a model may be steered by: found in folders by name, loaded on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import ControlMismatch
from server.models.controls.control import Control
from server.models.controls.control_folder import CONFIG, ControlFolder, folder_stamp
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from server.models.controls.control_kind import ControlKind
    from server.models.weight_memory import WeightMemory

__all__ = ["ControlShelf"]


class ControlShelf(WeightShelf[ControlFolder, Control]):
    """The ControlNets that fit one model, folders ``NAME``; see :class:`WeightShelf`.

    Args:
        folders: that hold folders with a ``config.json``.
        model: name of the model.
        kind: what the model takes; None where it takes none.
        memory: where loaded ControlNets are kept.
        device: where the model is.
        dtype: of its weights.
    """

    what = "ControlNet"
    mismatch = ControlMismatch

    def __init__(
        self,
        folders: Sequence[Path],
        model: str,
        kind: ControlKind | None,
        memory: WeightMemory[Control],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folders, model, memory, device, dtype)
        self._kind = kind

    def available(self) -> tuple[ControlFolder, ...]:
        """Those that fit the model, by name."""
        return () if self._kind is None else super().available()

    def find(self, name: str) -> ControlFolder:
        """The ControlNet of a name.

        Raises:
            ControlMismatch: there is none, or it does not fit the model.
        """
        self._taken()
        return super().find(name)

    def _is_one(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def _stamp(self, path: Path) -> tuple[int, int]:
        return folder_stamp(path)

    def _understood(self, name: str, path: Path) -> ControlFolder:
        return ControlFolder.read(path, self._model, self._taken())

    def _taken(self) -> ControlKind:
        if self._kind is None:
            raise ControlMismatch(f"model {self._model!r} takes no ControlNets.")
        return self._kind

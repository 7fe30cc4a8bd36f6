"""The ControlNets that a model may be steered by: found in folders by name, loaded on demand."""

from __future__ import annotations

import logging
from os import scandir
from typing import TYPE_CHECKING

from server.errors import ControlMismatch
from server.models.adapters.shelf import NAME
from server.models.controls.control_folder import CONFIG, ControlFolder, folder_stamp

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from server.models.controls.control import Control
    from server.models.controls.control_kind import ControlKind
    from server.models.weight_memory import WeightMemory

__all__ = ["ControlShelf"]

log = logging.getLogger(__name__)


class ControlShelf:
    """The ControlNets that fit one model, by name; safe from any thread.

    The folders are read again whenever somebody asks, so that a new ControlNet needs no restart; of
    one that has not changed, nothing is read twice.

    Args:
        folders: that hold folders ``NAME`` with a ``config.json``. Of one name in several, the last
            one counts.
        model: name of the model.
        kind: what the model takes; None where it takes none.
        memory: where loaded ControlNets are kept.
        device: where the model is.
        dtype: of its weights.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        model: str,
        kind: ControlKind | None,
        memory: WeightMemory[Control],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._folders = folders
        self._model = model
        self._kind = kind
        self._memory = memory
        self._device = device
        self._dtype = dtype
        self._read: dict[Path, tuple[tuple[int, int], ControlFolder | ControlMismatch]] = {}

    def available(self) -> tuple[ControlFolder, ...]:
        """Those that fit the model, by name."""
        if self._kind is None:
            return ()
        outcomes = [self._outcome(path, self._kind) for _, path in sorted(self._paths().items())]
        return tuple(one for one in outcomes if isinstance(one, ControlFolder))

    def find(self, name: str) -> ControlFolder:
        """The ControlNet of a name.

        Raises:
            ControlMismatch: there is none, or it does not fit the model.
        """
        if self._kind is None:
            raise ControlMismatch(f"model {self._model!r} takes no ControlNets.")
        path = self._paths().get(name)
        if path is None:
            known = ", ".join(one.name for one in self.available()) or "none"
            raise ControlMismatch(
                f"{name[:128]!r} is no ControlNet of model {self._model!r}; there are: {known}."
            )
        outcome = self._outcome(path, self._kind)
        if isinstance(outcome, ControlMismatch):
            # Not the same object again: each raise would lengthen its traceback.
            raise ControlMismatch(outcome.message)
        return outcome

    def check_together(self, names: Collection[str]) -> None:
        """Refuse ControlNets that can never be in memory at once.

        Args:
            names: of those that :meth:`find` finds, each once.

        Raises:
            ControlMismatch: they take more memory than is allowed for all.
        """
        sizes = (self.find(name).nbytes(self._dtype) for name in names)
        if refusal := self._memory.never_together(sizes):
            raise ControlMismatch(refusal)

    def is_loaded(self, name: str) -> bool:
        """Whether :meth:`load` would neither read the disk nor wait for others to be read."""
        path = self._paths().get(name)
        return path is not None and self._memory.has((self._model, path, folder_stamp(path)))

    def load(self, name: str) -> Control:
        """The ControlNet of a name, with its weights; reads the disk where it is not in memory.

        Raises:
            ControlMismatch: there is none, or it does not fit the model.
            Overloaded: the ControlNets of requests under way, or the device, leave no room for it.
        """
        found = self.find(name)
        key = self._model, found.path, found.stamp
        return self._memory.get(
            key, found.nbytes(self._dtype), lambda: found.load(self._device, self._dtype)
        )

    def forget(self) -> None:
        """Let go of the loaded ControlNets; the next request loads its own again."""
        self._memory.forget(self._model)

    def _paths(self) -> Mapping[str, Path]:
        paths: dict[str, Path] = {}
        for folder in self._folders:
            if not folder.is_dir():
                continue
            with scandir(folder) as entries:
                for entry in entries:
                    if NAME.fullmatch(entry.name) and (folder / entry.name / CONFIG).is_file():
                        paths[entry.name] = folder / entry.name
        return paths

    def _outcome(self, path: Path, kind: ControlKind) -> ControlFolder | ControlMismatch:
        stamp = folder_stamp(path)
        if path in self._read and self._read[path][0] == stamp:
            return self._read[path][1]
        try:
            outcome = ControlFolder.read(path, self._model, kind)
            if (nbytes := outcome.nbytes(self._dtype)) > self._memory.most_bytes:
                raise ControlMismatch(
                    f"ControlNet {path.name!r} takes {nbytes} bytes of memory; at most "
                    f"{self._memory.most_bytes} are allowed for all ControlNets."
                )
        except ControlMismatch as error:
            log.info("for model %r: %s", self._model, error)
            outcome = error
        self._read[path] = stamp, outcome
        return outcome

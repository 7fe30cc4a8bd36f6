"""The adapters that a model may be given: found in folders by name, loaded when they are wanted."""

from __future__ import annotations

import logging
import re
from os import scandir
from typing import TYPE_CHECKING

from server.errors import AdapterMismatch
from server.models.adapters.adapter_file import AdapterFile
from server.models.folder import stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from server.models.adapters.adapter import Adapter
    from server.models.adapters.placing import Target
    from server.models.weight_memory import WeightMemory

__all__ = ["NAME", "AdapterShelf"]

log = logging.getLogger(__name__)

ENDING = ".safetensors"
NAME = re.compile(r"\w[\w .+-]{0,126}")
"""File names without their ending that can be adapters' names: no path, and no sign that the text
in pictures gives a meaning to."""


class AdapterShelf:
    """The adapters that fit one model, by name; safe from any thread.

    The folders are read again whenever somebody asks, so that a new file needs no restart; of a
    file that has not changed, nothing is read twice.

    Args:
        folders: that hold ``NAME.safetensors`` files. Of one name in several, the last one counts.
        target: the model.
        memory: where loaded adapters are kept.
        device: where the model is.
        dtype: of its weights.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        target: Target,
        memory: WeightMemory[Adapter],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._folders = folders
        self._target = target
        self._memory = memory
        self._device = device
        self._dtype = dtype
        self._read: dict[Path, tuple[tuple[int, int], AdapterFile | AdapterMismatch]] = {}

    def available(self) -> tuple[AdapterFile, ...]:
        """Those that fit the model, by name."""
        outcomes = [self._outcome(name, path) for name, path in sorted(self._paths().items())]
        return tuple(one for one in outcomes if isinstance(one, AdapterFile))

    def find(self, name: str) -> AdapterFile:
        """The adapter of a name.

        Raises:
            AdapterMismatch: there is none, or it does not fit the model.
        """
        path = self._paths().get(name)
        if path is None:
            known = ", ".join(one.name for one in self.available()) or "none"
            raise AdapterMismatch(
                f"{name[:128]!r} is no adapter of model {self._target.model!r}; there are: {known}."
            )
        outcome = self._outcome(name, path)
        if isinstance(outcome, AdapterMismatch):
            # Not the same object again: each raise would lengthen its traceback.
            raise AdapterMismatch(outcome.message)
        return outcome

    def check_together(self, files: Iterable[AdapterFile]) -> None:
        """Refuse adapters that can never be in memory at once.

        Args:
            files: as :meth:`find` finds them, each once.

        Raises:
            AdapterMismatch: they take more memory than is allowed for all.
        """
        if refusal := self._memory.never_together(file.nbytes(self._dtype) for file in files):
            raise AdapterMismatch(refusal)

    def is_loaded(self, name: str) -> bool:
        """Whether :meth:`load` would neither read the disk nor wait for others to be read."""
        path = self._paths().get(name)
        return path is not None and self._memory.has((self._target.model, path, stamp_of(path)))

    def load(self, name: str) -> Adapter:
        """The adapter of a name, with its weights; reads the disk where it is not in memory.

        Raises:
            AdapterMismatch: there is none, or it does not fit the model.
            Overloaded: the adapters of requests under way leave no room for it.
        """
        file = self.find(name)
        key = self._target.model, file.path, file.stamp
        return self._memory.get(
            key, file.nbytes(self._dtype), lambda: file.load(self._device, self._dtype)
        )

    def forget(self) -> None:
        """Let go of the loaded adapters; the next request loads its own again."""
        self._memory.forget(self._target.model)

    def _paths(self) -> Mapping[str, Path]:
        paths: dict[str, Path] = {}
        for folder in self._folders:
            if not folder.is_dir():
                continue
            with scandir(folder) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(ENDING)
                    if name != entry.name and NAME.fullmatch(name) and entry.is_file():
                        paths[name] = folder / entry.name
        return paths

    def _outcome(self, name: str, path: Path) -> AdapterFile | AdapterMismatch:
        stamp = stamp_of(path)
        if path in self._read and self._read[path][0] == stamp:
            return self._read[path][1]
        try:
            outcome = AdapterFile.read(name, path, self._target)
            if (nbytes := outcome.nbytes(self._dtype)) > self._memory.most_bytes:
                raise AdapterMismatch(
                    f"adapter {name!r} takes {nbytes} bytes of memory; at most "
                    f"{self._memory.most_bytes} are allowed for all adapters."
                )
        except AdapterMismatch as error:
            log.info("for model %r: %s", self._target.model, error)
            outcome = error
        self._read[path] = stamp, outcome
        return outcome

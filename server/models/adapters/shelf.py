"""The adapters that a model may be given: found in folders by name, loaded when they are wanted."""

from __future__ import annotations

import logging
import re
from os import scandir
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

from server.errors import AdapterMismatch, Overloaded
from server.lru import ByteBoundedLRU
from server.models.adapters.adapter_file import AdapterFile
from server.models.folder import stamp_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from server.models.adapters.adapter import Adapter
    from server.models.adapters.placing import Target

__all__ = ["AdapterMemory", "AdapterShelf"]

log = logging.getLogger(__name__)

ENDING = ".safetensors"
NAME = re.compile(r"\w[\w .+-]{0,126}")
"""File names without their ending that can be adapters' names: no path, and no sign that the text
in pictures gives a meaning to."""

FULL_RETRY_S = 5.0

Key: TypeAlias = "tuple[str, Path, tuple[int, int]]"
"""The name of the model, and the file with the stamp of when it was read."""


class AdapterMemory:
    """The loaded adapters of all models, bounded by bytes; safe from any thread.

    Those of requests under way count too, whether or not they are kept for the next request.

    Args:
        most_bytes: of all adapters together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: ByteBoundedLRU[Key, Adapter] = ByteBoundedLRU(
            most_bytes, lambda adapter: adapter.nbytes
        )
        self._alive: WeakValueDictionary[Key, Adapter] = WeakValueDictionary()
        self._loading = Lock()

    @property
    def bytes(self) -> int:
        """Of all adapters that are kept or in use."""
        return sum(adapter.nbytes for adapter in list(self._alive.values()))

    def get(self, key: Key, nbytes: int, load: Callable[[], Adapter]) -> Adapter:
        """The adapter of a key, loaded where it is not there.

        Args:
            key: of the adapter.
            nbytes: of it, at most ``most_bytes``.
            load: reads it.

        Raises:
            Overloaded: the adapters of requests under way leave no room for it.
        """
        if (kept := self._kept.find(key)) is not None:
            return kept
        with self._loading:
            found = self._kept.find(key) or self._alive.get(key)
            if found is None:
                self._make_room(nbytes)
                found = load()
                self._alive[key] = found
            self._kept.put(key, found)
            return found

    def forget(self, model: str) -> None:
        """Let go of the adapters of a model, whose keys begin with its name."""
        self._kept.discard(lambda key: key[0] == model)

    def _make_room(self, nbytes: int) -> None:
        for kept in (self.most_bytes - nbytes, 0):
            self._kept.shrink(kept)
            if self.bytes + nbytes <= self.most_bytes:
                return
        raise Overloaded(
            FULL_RETRY_S,
            "The adapters of the requests under way fill the memory for adapters; "
            f"try again in {FULL_RETRY_S:.0f} s.",
        )


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
        memory: AdapterMemory,
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

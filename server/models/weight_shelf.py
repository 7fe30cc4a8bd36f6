"""Shelves of weights that requests name: found in folders, and loaded on demand."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from os import listdir
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from server.lookup import Lookup
from server.models.folder_cache import FolderCache
from server.models.weight_memory import Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from server.errors import WeftError
    from server.models.weight_memory import WeightMemory

__all__ = ["NAME", "WeightShelf"]

log = logging.getLogger(__name__)

NAME = re.compile(r"\w[\w .+-]{0,126}")
"""Valid names: no paths, and no characters that have a meaning in the text stored in images."""

Loaded = TypeVar("Loaded", covariant=True)


class Found(Protocol[Loaded]):
    """Something that can be loaded, described without its weights."""

    @property
    def name(self) -> str:
        """Name that requests use."""
        ...

    @property
    def path(self) -> Path:
        """Path of the file or folder."""
        ...

    @property
    def stamp(self) -> tuple[int, int]:
        """Value that changes when the file or folder changes."""
        ...

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights in a dtype, in bytes."""
        ...

    def load(self, device: torch.device, dtype: torch.dtype) -> Loaded:
        """Load the weights."""
        ...


Here = TypeVar("Here", bound=Found[Any])
Wanted = TypeVar("Wanted")


class WeightShelf(ABC, Generic[Here, Weights, Wanted]):
    """Weights of one kind that fit one model, by name; safe from any thread.

    Each lookup sees the current content of the folders, so new files need no restart; unchanged
    files are read only once.

    Args:
        folders: folders to search. If several contain the same name, the last one is used.
        model: name of the model.
        wanted: properties that weights must fit; None if the model accepts nothing of this kind.
        memory: keeps loaded weights.
        device: device of the model.
        dtype: dtype of its weights.
    """

    what: ClassVar[str]
    """Name of the kind, in the singular."""

    asked: ClassVar[str]
    """Name of what requests ask for, in the plural."""

    ending: ClassVar[str] = ""
    """Ending of the names in the folders, which requests leave out."""

    mismatch: ClassVar[type[WeftError]]
    """Exception for weights that cannot be used; created from a sentence."""

    def __init__(
        self,
        folders: Sequence[Path],
        model: str,
        wanted: Wanted | None,
        memory: WeightMemory[Weights],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._folders = folders if wanted is not None else ()
        self._model = model
        self._wanted = wanted
        self._memory = memory
        self._device = device
        self._dtype = dtype
        self._read: dict[Path, tuple[tuple[int, int], Here | str]] = {}
        self._entries = FolderCache(self._listed)
        self._lookup: Lookup[Sequence[Mapping[str, Path]]] = Lookup(
            self._looked, (), f"folders with {self.what}s"
        )

    @abstractmethod
    def _is_one(self, path: Path) -> bool:
        """Whether a path is of this kind, by its type and contents."""

    @abstractmethod
    def _stamp(self, path: Path) -> tuple[int, int]:
        """Value that changes when the file or folder changes."""

    @abstractmethod
    def _understood(self, name: str, path: Path, wanted: Wanted) -> Here:
        """Describe what is at a path; raises ``mismatch`` if it does not fit."""

    def available(self) -> tuple[Here, ...]:
        """Everything that fits the model, sorted by name."""
        outcomes = [self._outcome(name, path) for name, path in sorted(self._paths().items())]
        return tuple(one for one in outcomes if not isinstance(one, str))

    def unfit(self) -> Mapping[str, str]:
        """Why everything else cannot be used with the model: a sentence by name."""
        outcomes = {name: self._outcome(name, path) for name, path in sorted(self._paths().items())}
        return {name: one for name, one in outcomes.items() if isinstance(one, str)}

    def find(self, name: str) -> Here:
        """Look up a name.

        Raises:
            WeftError: ``mismatch``; the name is unknown, or does not fit the model.
        """
        self._taken()
        path = self._path(name)
        if path is None:
            known = ", ".join(one.name for one in self.available()) or "none"
            raise self.mismatch(
                f"{name[:128]!r} is not among the {self.what}s of model {self._model!r}; these "
                f"are: {known}."
            )
        outcome = self._outcome(name, path)
        if isinstance(outcome, str):
            raise self.mismatch(outcome)
        return outcome

    def check_together(self, found: Iterable[Here]) -> None:
        """Refuse weights that can never be in memory at once.

        Args:
            found: results of :meth:`find`, each once.

        Raises:
            WeftError: ``mismatch``; together they exceed the limit for all weights.
        """
        if refusal := self._memory.never_together(one.nbytes(self._dtype) for one in found):
            raise self.mismatch(refusal)

    def is_loaded(self, name: str) -> bool:
        """Whether :meth:`load` would neither read the disk nor wait for another load."""
        path = self._path(name)
        return path is not None and self._memory.has((self._model, path, self._stamp(path)))

    def load(self, name: str) -> Weights:
        """Load the weights of a name, unless they are in memory.

        Raises:
            WeftError: ``mismatch``; the name is unknown, or does not fit the model.
            Overloaded: weights of running requests, or the device, leave no room for it.
        """
        found = self.find(name)
        key = self._model, found.path, found.stamp
        return self._memory.get(
            key, found.nbytes(self._dtype), lambda: found.load(self._device, self._dtype)
        )

    def forget(self) -> None:
        """Evict loaded weights; the next request loads its own again."""
        self._memory.forget(self._model)

    def _taken(self) -> Wanted:
        if self._wanted is None:
            raise self.mismatch(f"model {self._model!r} takes no {self.asked}.")
        return self._wanted

    def _paths(self) -> Mapping[str, Path]:
        places = self._places()
        names = {name for entries in places for name in entries}
        found = {name: self._chosen(name, places) for name in names}
        return {name: path for name, path in found.items() if path is not None}

    def _path(self, name: str) -> Path | None:
        return self._chosen(name, self._places())

    def _places(self) -> Sequence[Mapping[str, Path]]:
        """Candidates by name alone, folder by folder, in order of precedence."""
        return self._lookup.latest()

    def _looked(self) -> Sequence[Mapping[str, Path]]:
        return [self._entries.of(folder) for folder in reversed(self._folders)]

    def _chosen(self, name: str, places: Sequence[Mapping[str, Path]]) -> Path | None:
        found = (entries[name] for entries in places if name in entries)
        return next(filter(self._is_one, found), None)

    def _listed(self, folder: Path) -> Mapping[str, Path]:
        """Candidates in one folder, by name alone."""
        try:
            entries = [entry for entry in listdir(folder) if entry.endswith(self.ending)]
        except OSError:
            return {}
        named = ((entry.removesuffix(self.ending), folder / entry) for entry in entries)
        return {name: path for name, path in named if NAME.fullmatch(name)}

    def _outcome(self, name: str, path: Path) -> Here | str:
        """The description of what is at a path, or the sentence why it cannot be used."""
        stamp = self._stamp(path)
        if path in self._read and self._read[path][0] == stamp:
            return self._read[path][1]
        outcome: Here | str
        try:
            outcome = self._understood(name, path, self._taken())
            if (nbytes := outcome.nbytes(self._dtype)) > self._memory.max_bytes:
                outcome = (
                    f"{self.what} {name!r} takes {nbytes} bytes of memory; at most "
                    f"{self._memory.max_bytes} are allowed for all {self.what}s."
                )
        except self.mismatch as error:
            outcome = error.message
        if isinstance(outcome, str):
            log.info("for model %r: %s", self._model, outcome)
        self._read[path] = stamp, outcome
        return outcome

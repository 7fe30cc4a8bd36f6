"""Weights that requests ask for by name: found in folders, and loaded when they are wanted."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from os import listdir
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

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
"""What can be a name: no path, and no sign that the text in pictures gives a meaning to."""

Loaded = TypeVar("Loaded", covariant=True)


class Found(Protocol[Loaded]):
    """What there is to load, understood without its weights."""

    @property
    def name(self) -> str:
        """As requests say it."""
        ...

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def stamp(self) -> tuple[int, int]:
        """By which a change is noticed."""
        ...

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights in a type."""
        ...

    def load(self, device: torch.device, dtype: torch.dtype) -> Loaded:
        """Read the weights."""
        ...


Here = TypeVar("Here", bound=Found[Any])
Wanted = TypeVar("Wanted")


class WeightShelf(ABC, Generic[Here, Weights, Wanted]):
    """Weights of one sort that fit one model, by name; safe from any thread.

    Whoever asks sees what the folders have by then, so that something new needs no restart; of what
    has not changed, nothing is read twice.

    Args:
        folders: to look in. Of one name in several, the last one counts.
        model: name of the model.
        wanted: what must fit the model; None where it takes nothing of the sort.
        memory: where loaded weights are kept.
        device: where the model is.
        dtype: of its weights.
    """

    what: ClassVar[str]
    """One of them is called."""

    asked: ClassVar[str]
    """What requests ask for is called, in the plural."""

    ending: ClassVar[str] = ""
    """Of their names in the folders, which requests leave out."""

    mismatch: ClassVar[type[WeftError]]
    """Raised about those that cannot be used; made of a sentence."""

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

    @abstractmethod
    def _is_one(self, path: Path) -> bool:
        """Whether an entry of a folder is one of this sort, by what is there."""

    @abstractmethod
    def _stamp(self, path: Path) -> tuple[int, int]:
        """By which a change of it is noticed."""

    @abstractmethod
    def _understood(self, name: str, path: Path, wanted: Wanted) -> Here:
        """What it is; raises ``mismatch`` if it is not what is wanted."""

    def available(self) -> tuple[Here, ...]:
        """Those that fit the model, by name."""
        outcomes = [self._outcome(name, path) for name, path in sorted(self._paths().items())]
        return tuple(one for one in outcomes if not isinstance(one, str))

    def unfit(self) -> Mapping[str, str]:
        """Why each of the others cannot be used with the model, a sentence by name."""
        outcomes = {name: self._outcome(name, path) for name, path in sorted(self._paths().items())}
        return {name: one for name, one in outcomes.items() if isinstance(one, str)}

    def find(self, name: str) -> Here:
        """The one of a name.

        Raises:
            WeftError: ``mismatch``; there is none, or it does not fit the model.
        """
        self._taken()
        path = self._path(name)
        if path is None:
            known = ", ".join(one.name for one in self.available()) or "none"
            raise self.mismatch(
                f"{name[:128]!r} is no {self.what} of model {self._model!r}; there are: {known}."
            )
        outcome = self._outcome(name, path)
        if isinstance(outcome, str):
            raise self.mismatch(outcome)
        return outcome

    def check_together(self, found: Iterable[Here]) -> None:
        """Refuse what can never be in memory at once.

        Args:
            found: as :meth:`find` finds them, each once.

        Raises:
            WeftError: ``mismatch``; they take more memory than is allowed for all.
        """
        if refusal := self._memory.never_together(one.nbytes(self._dtype) for one in found):
            raise self.mismatch(refusal)

    def is_loaded(self, name: str) -> bool:
        """Whether :meth:`load` would neither read the disk nor wait for others to be read."""
        path = self._path(name)
        return path is not None and self._memory.has((self._model, path, self._stamp(path)))

    def load(self, name: str) -> Weights:
        """The one of a name, with its weights; reads the disk where it is not in memory.

        Raises:
            WeftError: ``mismatch``; there is none, or it does not fit the model.
            Overloaded: those of requests under way, or the device, leave no room for it.
        """
        found = self.find(name)
        key = self._model, found.path, found.stamp
        return self._memory.get(
            key, found.nbytes(self._dtype), lambda: found.load(self._device, self._dtype)
        )

    def forget(self) -> None:
        """Let go of what is loaded; the next request loads its own again."""
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
        """What may be of this sort by its name alone, folder by folder; what counts comes first."""
        return [self._entries.of(folder) for folder in reversed(self._folders)]

    def _chosen(self, name: str, places: Sequence[Mapping[str, Path]]) -> Path | None:
        found = (entries[name] for entries in places if name in entries)
        return next(filter(self._is_one, found), None)

    def _listed(self, folder: Path) -> Mapping[str, Path]:
        """The same of one folder."""
        try:
            entries = [entry for entry in listdir(folder) if entry.endswith(self.ending)]
        except OSError:
            return {}
        named = ((entry.removesuffix(self.ending), folder / entry) for entry in entries)
        return {name: path for name, path in named if NAME.fullmatch(name)}

    def _outcome(self, name: str, path: Path) -> Here | str:
        """What it is, or the sentence why it cannot be used."""
        stamp = self._stamp(path)
        if path in self._read and self._read[path][0] == stamp:
            return self._read[path][1]
        outcome: Here | str
        try:
            outcome = self._understood(name, path, self._taken())
            if (nbytes := outcome.nbytes(self._dtype)) > self._memory.most_bytes:
                outcome = (
                    f"{self.what} {name!r} takes {nbytes} bytes of memory; at most "
                    f"{self._memory.most_bytes} are allowed for all {self.what}s."
                )
        except self.mismatch as error:
            outcome = error.message
        if isinstance(outcome, str):
            log.info("for model %r: %s", self._model, outcome)
        self._read[path] = stamp, outcome
        return outcome

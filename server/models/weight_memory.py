"""Weights that requests ask for by name, loaded when they are wanted and bounded by bytes."""

from __future__ import annotations

import gc
from threading import Lock
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from server.errors import Overloaded
from server.heap import return_free_memory
from server.lru import ByteBoundedLRU
from server.models.memory import FULL_RETRY_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

__all__ = ["WeightMemory"]

Key: TypeAlias = "tuple[str, Path, tuple[int, int]]"
"""The name of the model, and the file or folder with the stamp of when it was read."""


class Sized(Protocol):
    """Loaded weights."""

    @property
    def nbytes(self) -> int:
        """Their memory in bytes."""
        ...


Weights = TypeVar("Weights", bound=Sized)


class WeightMemory(Generic[Weights]):
    """Loaded weights of one sort for all models, bounded by bytes; safe from any thread.

    Those of requests under way count too, whether or not they are kept for the next request.

    Args:
        most_bytes: of all of them together.
        what: they are called, in the plural.
    """

    def __init__(self, most_bytes: int, what: str) -> None:
        self.most_bytes = most_bytes
        self._what = what
        self._kept: ByteBoundedLRU[Key, Weights] = ByteBoundedLRU(
            most_bytes, lambda weights: weights.nbytes
        )
        self._alive: WeakValueDictionary[Key, Weights] = WeakValueDictionary()
        self._loading = Lock()

    @property
    def bytes(self) -> int:
        """Of all that are kept or in use."""
        return sum(weights.nbytes for weights in list(self._alive.values()))

    def get(self, key: Key, nbytes: int, load: Callable[[], Weights]) -> Weights:
        """The weights of a key, loaded where they are not there.

        Args:
            key: of the weights.
            nbytes: of them, at most ``most_bytes``.
            load: reads them; where it finds no room on the device, it is called again without
                those that are only kept.

        Raises:
            Overloaded: those of requests under way, or the device, leave no room for them.
        """
        if (kept := self._kept.find(key)) is not None:
            return kept
        with self._loading:
            found = self._kept.find(key) or self._alive.get(key)
            if found is None:
                self._make_room(nbytes)
                found = self._loaded(load)
                self._alive[key] = found
                # What was read and converted on the way may be several times as large.
                return_free_memory()
            self._kept.put(key, found)
            return found

    def never_together(self, sizes: Iterable[int]) -> str | None:
        """Why weights of these bytes can never be in memory at once, as a clause; None if they can.

        Args:
            sizes: bytes of all that one request needs.
        """
        if (nbytes := sum(sizes)) <= self.most_bytes:
            return None
        return (
            f"the {self._what} of this request take {nbytes} bytes of memory together; at most "
            f"{self.most_bytes} are allowed."
        )

    def has(self, key: Key) -> bool:
        """Whether the weights of a key are there without waiting for any to be loaded."""
        return self._kept.find(key) is not None

    def forget(self, model: str) -> None:
        """Let go of the weights of a model, whose keys begin with its name."""
        self._kept.discard(lambda key: key[0] == model)

    def _loaded(self, load: Callable[[], Weights]) -> Weights:
        try:
            return load()
        except Overloaded:
            # The device may have less room than all weights are allowed. Nobody would ever let go
            # of those that no request uses.
            self._kept.shrink(0)
        gc.collect()
        return_free_memory()
        return load()

    def _make_room(self, nbytes: int) -> None:
        for kept in (self.most_bytes - nbytes, 0):
            self._kept.shrink(kept)
            if self.bytes + nbytes <= self.most_bytes:
                return
        raise Overloaded(
            FULL_RETRY_S,
            f"The {self._what} of the requests under way fill the memory for {self._what}; "
            f"try again in {FULL_RETRY_S:.0f} s.",
        )

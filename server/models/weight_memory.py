"""Memory for weights that requests name: loaded on demand, and bounded in bytes."""

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
"""Name of the model, and path of the file or folder with its stamp at the time of reading."""


class Sized(Protocol):
    """Loaded weights."""

    @property
    def nbytes(self) -> int:
        """Their memory in bytes."""
        ...


Weights = TypeVar("Weights", bound=Sized)


class WeightMemory(Generic[Weights]):
    """Loaded weights of one kind for all models, bounded in bytes; safe from any thread.

    The bound includes weights that running requests use, whether or not they are in the cache.

    Args:
        max_bytes: maximum size of all of them together, in bytes.
        what: name of the kind, in the plural.
    """

    def __init__(self, max_bytes: int, what: str) -> None:
        self.max_bytes = max_bytes
        self._what = what
        self._kept: ByteBoundedLRU[Key, Weights] = ByteBoundedLRU(
            max_bytes, lambda weights: weights.nbytes
        )
        self._alive: WeakValueDictionary[Key, Weights] = WeakValueDictionary()
        self._loading = Lock()

    @property
    def bytes(self) -> int:
        """Size of all weights that are cached or in use, in bytes."""
        return sum(weights.nbytes for weights in list(self._alive.values()))

    def get(self, key: Key, nbytes: int, load: Callable[[], Weights]) -> Weights:
        """The weights for a key, loaded if necessary.

        Args:
            key: key of the weights.
            nbytes: size of the weights, at most ``max_bytes``.
            load: loads them; if it finds no room on the device, unused weights are evicted and it
                is called again.

        Raises:
            Overloaded: weights of running requests, or the device, leave no room for them.
        """
        if (kept := self._kept.find(key)) is not None:
            return kept
        with self._loading:
            found = self._kept.find(key) or self._alive.get(key)
            if found is None:
                self._make_room(nbytes)
                found = self._loaded(load)
                self._alive[key] = found
                # Buffers for reading and converting may have been several times as large.
                return_free_memory()
            self._kept.put(key, found)
            return found

    def never_together(self, sizes: Iterable[int]) -> str | None:
        """Why weights of these sizes can never be in memory at once, as a clause; None if they can.

        Args:
            sizes: sizes in bytes of all weights that one request needs.
        """
        if (nbytes := sum(sizes)) <= self.max_bytes:
            return None
        return (
            f"the {self._what} of this request take {nbytes} bytes of memory together; at most "
            f"{self.max_bytes} are allowed."
        )

    def has(self, key: Key) -> bool:
        """Whether the weights of a key are cached, so that ``get`` need not wait for loading."""
        return self._kept.find(key) is not None

    def forget(self, model: str) -> None:
        """Evict the weights of a model, whose keys begin with its name."""
        self._kept.discard(lambda key: key[0] == model)

    def _loaded(self, load: Callable[[], Weights]) -> Weights:
        try:
            return load()
        except Overloaded:
            # The device may have less room than ``max_bytes``. Cached weights that no request uses
            # would never be released otherwise.
            self._kept.shrink(0)
        gc.collect()
        return_free_memory()
        return load()

    def _make_room(self, nbytes: int) -> None:
        for kept in (self.max_bytes - nbytes, 0):
            self._kept.shrink(kept)
            if self.bytes + nbytes <= self.max_bytes:
                return
        raise Overloaded(
            FULL_RETRY_S,
            f"The {self._what} of running requests fill the memory for {self._what}; try again in "
            f"{FULL_RETRY_S:.0f} s.",
        )

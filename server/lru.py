"""What was made once and may be wanted again, bounded by its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Kept"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """Values by key, of which the least recently used go when all together are too large.

    Safe from any thread; two that miss the same key at once both make it.

    Args:
        most_bytes: bound on the sum of all sizes; what is larger by itself is not kept.
        size: bytes of a value.
    """

    def __init__(self, most_bytes: int, size: Callable[[Value], int]) -> None:
        self._most_bytes = most_bytes
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Sum of the sizes of all that is kept."""
        return self._bytes

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = made
                self._bytes += self._size(made)
                while self._bytes > self._most_bytes:
                    _, gone = self._values.popitem(last=False)
                    self._bytes -= self._size(gone)
        return made

"""A least-recently-used cache, bounded by the bytes of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["ByteBoundedLRU"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteBoundedLRU(Generic[Key, Value]):
    """A cache with least-recently-used eviction and a bound on the bytes of its values.

    It is thread-safe; two threads that miss the same key at once both make its value.

    Args:
        max_bytes: bound on the sum of all sizes. A value that is larger by itself is not cached,
            and evicts nothing.
        size: function that returns the bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        self._max_bytes = max_bytes
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Sum of the sizes of all cached values."""
        return self._bytes

    def find(self, key: Key) -> Value | None:
        """Return the value of a key, which counts as a use; None if it is not cached."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Key, value: Value) -> None:
        """Cache a value, unless the key has one already or the value is too large by itself."""
        size = self._size(value)
        with self._lock:
            if key in self._values or size > self._max_bytes:
                return
            self._values[key] = value
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, gone = self._values.popitem(last=False)
                self._bytes -= self._size(gone)

    def shrink(self, max_bytes: int) -> None:
        """Evict the least recently used values until at most this many bytes are cached."""
        with self._lock:
            while self._bytes > max(0, max_bytes):
                _, gone = self._values.popitem(last=False)
                self._bytes -= self._size(gone)

    def discard(self, unwanted: Callable[[Key], bool]) -> None:
        """Evict the values of all unwanted keys."""
        with self._lock:
            for key in [key for key in self._values if unwanted(key)]:
                self._bytes -= self._size(self._values.pop(key))

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made if it is not cached."""
        found = self.find(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

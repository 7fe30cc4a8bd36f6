"""Work that other threads ask the engine to do in its own thread, between two ticks."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Condition

__all__ = ["Chores"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Chores:
    """A queue of small pieces of work, done in the order in which they were requested.

    Args:
        wake: condition that the engine sleeps on; it guards the queue too.
    """

    def __init__(self, wake: Condition) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue some work; safe from any thread. The future gets what it returns or raises."""
        outcome: Future[Result] = Future()
        with self._wake:
            self._waiting.append((work, outcome))
            self._wake.notify()
        return outcome

    def do(self) -> None:
        """Do all queued work, in the engine's thread; an error goes to the future of its piece."""
        while (taken := self._take()) is not None:
            work, outcome = taken
            try:
                outcome.set_result(work())
            except Exception as error:
                log.exception("a chore failed")
                outcome.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """End all queued work with an error."""
        while (taken := self._take()) is not None:
            taken[1].set_exception(error)

    def _take(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._wake:
            return self._waiting.popleft() if self._waiting else None

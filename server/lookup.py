"""Looks at a disk that may stop answering."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import Final, Generic, TypeVar

__all__ = ["PATIENCE_S", "Lookup"]

log = logging.getLogger("weft")

PATIENCE_S: Final = 1.0
"""Seconds that a caller waits for a disk."""

Found = TypeVar("Found")


class Lookup(Generic[Found]):
    """A look at folders that is repeated for each caller; safe from any thread.

    If the disk does not answer in time, or with an error, as a network drive may, callers get what
    was found last. Until it answers, later callers do not wait for it.

    Args:
        look: reads the disk.
        before: result until the first look has succeeded.
        what: what is looked at, for the log.
    """

    def __init__(self, look: Callable[[], Found], before: Found, what: str) -> None:
        self._look = look
        self._found = before
        self._what = what
        self._late: Thread | None = None
        self._failing = False

    def latest(self) -> Found:
        """What is there now, or was there when the disk answered last."""
        # Read once, since another caller may change it.
        late = self._late
        if late is None or not late.is_alive():
            looking = Thread(target=self._try, name="weft-lookup", daemon=True)
            looking.start()
            looking.join(PATIENCE_S)
            still_looks = looking.is_alive()
            self._late = looking if still_looks else None
            if still_looks and late is None:
                log.error("%s: the disk does not answer; what was found last is used", self._what)
        return self._found

    def _try(self) -> None:
        try:
            self._found = self._look()
        except OSError as error:
            if not self._failing:
                log.error("%s: %s; what was found last is used", self._what, error)
            self._failing = True
        else:
            self._failing = False

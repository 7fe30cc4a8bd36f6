"""Bounds the time of transactions with PostgreSQL."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from threading import Lock, Timer
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Engine, event

__all__ = ["LONGEST_S", "Watchdog"]

LONGEST_S: Final = 10.0
"""Seconds for a transaction; each of them takes milliseconds."""


class Watchdog:
    """Ends transactions that the database does not answer, by shutting its connections down.

    Nothing else does if its processes are frozen, as in a virtual machine that is paused: the
    kernel there still acknowledges what it is sent, and the database's own timeouts do not run.
    Reading from the connection then fails as if the database had closed it, which also makes
    SQLAlchemy replace the connections of its pool.

    Args:
        engine: engine of SQLAlchemy for PostgreSQL, which has not connected yet.
        longest_s: seconds for a transaction.
    """

    def __init__(self, engine: Engine, longest_s: float = LONGEST_S) -> None:
        self._longest_s = longest_s
        self._connections: WeakSet[Any] = WeakSet()
        self._adding = Lock()
        event.listen(engine, "connect", self._add)

    @contextmanager
    def watching(self) -> Generator[None]:
        """Bound the time of the transaction in a `with` block."""
        timer = Timer(self._longest_s, self._shut_down)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _add(self, connection: Any, _: Any) -> None:
        with self._adding:
            self._connections.add(connection)

    def _shut_down(self) -> None:
        # All of them: the pool may be testing a connection that no transaction has yet.
        with self._adding:
            connections = list(self._connections)
        for connection in connections:
            # A closed one has no descriptor.
            with (
                suppress(OSError, connection.OperationalError),
                socket.socket(fileno=os.dup(connection.fileno())) as own,
            ):
                own.shutdown(socket.SHUT_RDWR)

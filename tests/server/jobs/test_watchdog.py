"""Connections that are made while others are shut down."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Event, Thread
from time import monotonic

import pytest
from sqlalchemy import create_engine

from server.jobs.watchdog import Watchdog

SEARCH_S = 1.0


class Closed:
    """A connection that is closed already."""

    OperationalError = OSError

    def fileno(self) -> int:
        raise OSError("the connection is closed")


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
def test_a_connection_that_is_made_meanwhile_does_not_keep_others_from_being_shut_down() -> None:
    watchdog, ended = Watchdog(create_engine("sqlite://")), Event()
    held: list[Closed] = []

    def connect() -> None:
        while not ended.is_set():
            held.append(Closed())
            watchdog._add(held[-1], None)
            if len(held) > 500:
                held.clear()

    connecting = Thread(target=connect)
    connecting.start()
    last = monotonic() + SEARCH_S
    try:
        while monotonic() < last:
            watchdog._shut_down()
    finally:
        ended.set()
        connecting.join()
    assert held

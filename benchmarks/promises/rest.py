"""Waits until a server has nothing left to do, so that no measurement pays for the one before."""

from __future__ import annotations

from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.real_server import Served

__all__ = ["comes_to_rest"]

WATCHED_S: Final = 0.5
IDLE: Final = 0.05
"""Share of a core that a server uses at most while it has nothing to do."""


def comes_to_rest(server: Served, within_s: float) -> bool:
    """Whether nothing waits at the server in time, and its processes do hardly anything.

    What others do on the machine does not count. A server without its defences may decode for
    minutes what nobody waits for.
    """
    until = monotonic() + within_s
    while True:
        began, before = perf_counter(), server.processor_s()
        sleep(WATCHED_S)
        share = (server.processor_s() - before) / (perf_counter() - began)
        if share <= IDLE and server.waiting_images() == 0:
            return True
        if monotonic() > until:
            return False

"""Waiting until a server is idle, so that no measurement is affected by the previous one."""

from __future__ import annotations

from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.real_server import Served

__all__ = ["comes_to_rest"]

WATCHED_S: Final = 0.5
IDLE: Final = 0.05
"""Maximum fraction of a core that an idle server uses."""


def comes_to_rest(server: Served, within_s: float) -> bool:
    """Whether the server's queue becomes empty in time and its processes become idle.

    Other load on the machine does not matter. A server without its defenses may decode pictures
    for minutes that nobody waits for.
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

"""Running a measurement in a process of its own, which can be killed whatever it waits for."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING

from benchmarks.promises.promise import Outcome

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

    from benchmarks.promises.promise import Measure
    from benchmarks.real_server import Served

__all__ = ["within"]


def within(limit_s: float, measure: Measure, server: Served) -> Outcome:
    """The outcome of a measurement, or that it did not end within the time limit.

    A server without its defenses may never respond again, and threads that wait for it cannot be
    ended. The measurement therefore runs in a fork, which is killed with all its child processes.

    Raises:
        RuntimeError: the measurement failed; its traceback is on the terminal.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(measure, server, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Outcome(f"no answer within {limit_s:g} s", kept=False, endless=True)
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a measurement failed") from None
    finally:
        _end(process)
        receiver.close()


def _end(process: ForkProcess) -> None:
    """Kill a process and its children, even those that outlive a completed measurement."""
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # It may not even have begun, and then leads no group.
        process.kill()
    process.join()


def _report(measure: Measure, server: Served, sender: Connection) -> None:
    os.setpgid(0, 0)
    sender.send(measure(server))

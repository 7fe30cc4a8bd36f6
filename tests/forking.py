"""Runs tests in several processes, forked from the one that has imported and collected them all.

Workers of pytest-xdist would each import torch, diffusers and all test modules.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

Group = Sequence[pytest.Item]
"""Tests that one process runs, in their order."""

WIDTH = 4
"""Bytes of a number in the queue; so few are always read at once."""


@dataclass
class Process:
    """A process that runs tests, and its last report."""

    pid: int
    last: str = "nothing"


def run(session: pytest.Session, groups: Sequence[Group], processes: int) -> None:
    """Run the groups like pytest's test loop, in processes that each take one group after another.

    The calling process must have a single thread, and must not have initialized CUDA.

    Raises:
        Failed: a process was killed or broke, or the limit of failed tests is reached.
        Interrupted: the session was told to stop.
    """
    terminal: Any = session.config.pluginmanager.getplugin("terminalreporter")
    if terminal:
        # Several files run at once, and their names would be mixed with each other's results.
        terminal.showfspath = False
    folders: Any = session.config._tmp_path_factory  # type: ignore[attr-defined]
    queue = _queue(len(groups))
    heard: dict[Connection, Process] = {}
    for number in range(processes):
        ours, theirs = Pipe(duplex=False)
        folder = folders.mktemp(f"process-{number}", numbered=False)
        if (pid := os.fork()) == 0:
            for connection in (ours, *heard):
                connection.close()
            folders._basetemp = folder
            _live(session, groups, queue, theirs)
        theirs.close()
        heard[ours] = Process(pid)
    os.close(queue)
    try:
        _follow(session, heard)
    finally:
        # A process that then tries to report ends.
        for connection, process in heard.items():
            connection.close()
            os.waitpid(process.pid, 0)


def _queue(numbers: int) -> int:
    """A pipe that holds the numbers below this one, with its write end closed."""
    queue, end = os.pipe()
    os.write(end, b"".join(number.to_bytes(WIDTH) for number in range(numbers)))
    os.close(end)
    return queue


def _follow(session: pytest.Session, heard: dict[Connection, Process]) -> None:
    """Pass on the reports of the processes until they have ended."""
    hook = session.config.hook
    while heard:
        for connection in wait([*heard]):
            assert isinstance(connection, Connection)
            process = heard[connection]
            try:
                told = connection.recv()
            except EOFError:
                del heard[connection]
                _, status = os.waitpid(process.pid, 0)
                if status:
                    ended = os.waitstatus_to_exitcode(status)
                    session.shouldfail = f"a process ended with {ended} after {process.last}"
            else:
                process.last = f"{told['when']} of {told['nodeid']}"
                report = hook.pytest_report_from_serializable(config=session.config, data=told)
                hook.pytest_runtest_logreport(report=report)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


def _live(
    session: pytest.Session, groups: Sequence[Group], queue: int, connection: Connection
) -> None:
    """What a process does from its fork to its end."""
    status = 1
    try:
        _set_up(session.config, connection)
        # If the run was stopped, nobody reads the reports any more.
        with suppress(BrokenPipeError, KeyboardInterrupt):
            _run_all(session, (item for group in _taken(groups, queue) for item in group))
        session._setupstate.teardown_exact(None)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork must not return to the code of its parent
        traceback.print_exc()
    finally:
        os._exit(status)


def _taken(groups: Sequence[Group], queue: int) -> Iterator[Group]:
    while number := os.read(queue, WIDTH):
        yield groups[int.from_bytes(number)]


def _run_all(session: pytest.Session, items: Iterator[pytest.Item]) -> None:
    item = next(items, None)
    while item is not None and not session.shouldfail and not session.shouldstop:
        # Fixtures that the next test also needs are kept.
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


def _set_up(config: pytest.Config, connection: Connection) -> None:
    """Have a process capture its own output, and send its reports to the process that forked it."""
    plugins = config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(_Teller(config, connection))
    capture: Any = plugins.getplugin("capturemanager")
    if capture:
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()


class _Teller:
    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self._config = config
        self._connection = connection

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._connection.send(told)

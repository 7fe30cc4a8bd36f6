"""A measurement that does not end is killed, with all its child processes."""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest

from benchmarks.promises.promise import Outcome
from benchmarks.promises.time_limit import within
from benchmarks.real_server import Served

SERVER = Served(port=9, process=os.getpid(), log=Path("none"))


def its_port(server: Served) -> Outcome:
    return Outcome(f"port {server.port}", kept=True)


def endless(started: Path, _: Served) -> Outcome:
    started.write_text(str(Popen(["sleep", "60"]).pid))
    time.sleep(60)
    return Outcome("never", kept=True)


def failing(_: Served) -> Outcome:
    raise ValueError("no measurement")


def test_a_measurement_says_what_it_found() -> None:
    assert within(30, its_port, SERVER) == Outcome("port 9", kept=True)


def test_a_measurement_without_an_end_is_broken_and_killed_with_its_processes(
    tmp_path: Path,
) -> None:
    began, started = time.monotonic(), tmp_path / "started"
    # On a loaded machine, a process may begin only after a second.
    for limit_s in (1, 10, 40):
        outcome = within(limit_s, partial(endless, started), SERVER)
        assert outcome == Outcome(f"no answer within {limit_s} s", kept=False, endless=True)
        if started.exists() and started.read_text():
            break
    assert time.monotonic() - began < 60
    assert not _runs(int(started.read_text()))


def test_a_measurement_that_is_broken_off_before_it_begins_is_killed_too(tmp_path: Path) -> None:
    began = time.monotonic()
    assert within(0, partial(endless, tmp_path / "started"), SERVER).endless
    assert time.monotonic() - began < 50


def test_a_measurement_that_fails_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="a measurement failed"):
        within(30, failing, SERVER)


def _runs(process: int) -> bool:
    """Whether a process still runs; one that has ended may be a zombie of its new parent."""
    with suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False

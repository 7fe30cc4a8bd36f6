"""What happens to a process that compiles, as seen by the server's thread for it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from stat import S_ISSOCK
from typing import TYPE_CHECKING

import pytest
from torch import nn

from server.models.compiling import process as module
from server.models.compiling.block_call import Layout
from server.models.compiling.process import CompilingProcess
from server.models.compiling.program import BlockJob

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

JOB = BlockJob(nn.Identity(), None, Layout((), (), ()), "cpu")


def answer(jobs: Connection, _: Path) -> None:
    """Do what the name of the program's file says."""
    # A spawned process does not have the other end of the connection; a fork has it.
    for number in range(3, 1024):
        with suppress(OSError):
            if number != jobs.fileno() and S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)
    while True:
        try:
            _, file, _ = jobs.recv()
        except EOFError:
            return
        if file.endswith("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        if file.endswith("hang"):
            signal.pause()
        jobs.send(f'{{"reason": "by {os.getpid()}"}}')


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompilingProcess:
    # Importing torch again would take longer than the tests.
    monkeypatch.setattr(module, "METHOD", "fork")
    monkeypatch.setattr(module, "main", answer)
    return CompilingProcess(tmp_path)


@pytest.mark.parametrize("fails", ["crash", "hang"])
def test_a_process_that_ends_or_takes_too_long_is_followed_by_another(
    compiling: CompilingProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    first = compiling.compile(JOB, tmp_path / "one")
    with monkeypatch.context() as short:
        short.setattr(module, "MAX_COMPILE_S", 0.05)
        assert compiling.compile(JOB, tmp_path / fails) is None
    again = compiling.compile(JOB, tmp_path / "two")
    assert first is not None
    assert again is not None
    assert first["reason"] != again["reason"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(first["reason"].removeprefix("by ")), 0)
    compiling.end()


def test_a_process_has_ended_by_itself_when_the_thread_that_started_it_ends(
    compiling: CompilingProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system signals it when that thread ends, which would interrupt its own ending."""
    monkeypatch.setattr(module, "MAX_EXIT_S", 60)
    compiling.compile(JOB, tmp_path / "one")
    assert compiling._running is not None
    process, _ = compiling._running
    compiling.end()
    assert process.exitcode == 0


def test_what_cannot_be_sent_leaves_the_process_as_it_is(
    compiling: CompilingProcess, tmp_path: Path
) -> None:
    first = compiling.compile(JOB, tmp_path / "one")
    block = nn.Identity()
    vars(block)["chosen"] = lambda: None
    with pytest.raises(Exception, match="pickle"):
        compiling.compile(BlockJob(block, None, Layout((), (), ()), "cpu"), tmp_path / "two")
    assert compiling.compile(JOB, tmp_path / "three") == first
    compiling.end()

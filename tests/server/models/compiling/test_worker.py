"""How the process that compiles measures, and how it ends."""

from __future__ import annotations

from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from multiprocessing import get_context
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

import pytest
from torch import nn

from server.models.compiling import worker
from server.models.compiling.block_call import Layout
from server.models.compiling.program import BlockJob
from server.models.compiling.worker import TURNS, main

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path


def compiling(jobs: Connection, cleaned: Path) -> None:
    # Like the release of multiprocessing's semaphores.
    Finalize(None, cleaned.touch, exitpriority=0)
    main(jobs, cleaned.parent)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_process_that_compiles_gives_back_what_it_holds_when_it_is_ended(
    tmp_path: Path,
) -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=compiling, args=(theirs, tmp_path / "cleaned"), daemon=True)
    process.start()
    # This is not a block: an answer shows that the process listens.
    ours.send((None, str(tmp_path / "program"), 1))
    assert "reason" in ours.recv()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_program_is_measured_while_no_other_process_measures_or_compiles_on_the_same_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def others() -> tuple[bool, bool]:
        return _is_free(tmp_path / TURNS, LOCK_SH), _is_free(tmp_path / TURNS, LOCK_EX)

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(worker, "draw_weights", lambda _: [])
    monkeypatch.setattr(worker, "export", lambda *_: None)
    monkeypatch.setattr(worker, "compile_to", lambda *_: seen.append(others()))

    def check(*_: object) -> tuple[float, float]:
        seen.append(others())
        return 2.0, 1.0

    monkeypatch.setattr(worker, "check", check)
    job = BlockJob(nn.Identity(), None, Layout((), (), ()), device)
    worker._measured(job, tmp_path / "program")
    # Several may compile at once, but not during a measurement on a CPU.
    assert seen == [(True, device == "cuda"), (False, False)]


def _is_free(file: Path, kind: int) -> bool:
    with file.open("a") as held:
        try:
            flock(held, kind | LOCK_NB)
        except BlockingIOError:
            return False
        return True

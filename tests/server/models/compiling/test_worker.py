"""How the process that compiles ends."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

import pytest

from server.models.compiling.worker import main

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path


def compiling(jobs: Connection, cleaned: Path) -> None:
    # As multiprocessing's semaphores are given back.
    Finalize(None, cleaned.touch, exitpriority=0)
    main(jobs)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_process_that_compiles_gives_back_what_it_holds_when_it_is_ended(
    tmp_path: Path,
) -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=compiling, args=(theirs, tmp_path / "cleaned"), daemon=True)
    process.start()
    # A block that is none: the answer says that the process listens.
    ours.send((None, str(tmp_path / "program"), 1))
    assert "reason" in ours.recv()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0
    assert (tmp_path / "cleaned").exists()

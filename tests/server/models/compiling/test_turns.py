"""A lock that is released when its holder ends."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest

from server.models.compiling.turns import alone, beside_others

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path


def hold(file: Path, told: Connection) -> None:
    with alone(file):
        told.send("held")
        signal.pause()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_killed_holds_up_no_other(tmp_path: Path) -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "turns", theirs), daemon=True)
    process.start()
    assert ours.recv() == "held"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with beside_others(tmp_path / "turns"), beside_others(tmp_path / "turns"):
        process.join(10)
    with alone(tmp_path / "turns"):
        pass

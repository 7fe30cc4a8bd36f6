"""An unfinished folder is removed once its process is gone, and not before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.models.unfinished import unfinished

FILL = """
import sys, time
from pathlib import Path
from server.models.unfinished import unfinished

with unfinished(Path(sys.argv[1])) as made:
    print(made, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_what_another_fills_is_not(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with unfinished(tmp_path) as made:
            assert {*tmp_path.iterdir()} == {theirs, made}
            made.rename(tmp_path / "finished")
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    assert theirs.exists()
    with unfinished(tmp_path) as made:
        assert {*tmp_path.iterdir()} == {tmp_path / "finished", made}


def test_one_that_cannot_be_filled_is_removed_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyError), unfinished(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())

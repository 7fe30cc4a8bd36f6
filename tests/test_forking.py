"""Tests that run in several processes are reported as if run by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CONFTEST = """
import os
from itertools import groupby

import pytest

from tests.forking import run


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    run(session, [[*items] for _, items in groupby(session.items, lambda item: item.path)], 2)
    return True


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    yield folder
    (folder / "torn down").touch()
"""

FIRST = """
import time
from pathlib import Path

import pytest

MET = Path(__file__).with_name("met")


def test_of_a_process_of_its_own(shared):
    assert shared.parent.name in ("process-0", "process-1")
    MET.touch()
    while not MET.with_name("met too").exists():
        time.sleep(0.01)


def test_that_fails(shared):
    print("what it says")
    assert 1 == 2


@pytest.mark.skip(reason="needs no other")
def test_that_is_skipped():
    pass
"""

SECOND = """
import time
from pathlib import Path

MET = Path(__file__).with_name("met too")


def test_beside_the_others(shared):
    MET.touch()
    while not MET.with_name("met").exists():
        time.sleep(0.01)
"""

KILLED = """
import os
import signal


def test_that_ends_its_process():
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_it():
    raise AssertionError
"""

WAITING = """
import select


def test_that_goes_on(shared, pytestconfig):
    plugins = pytestconfig.pluginmanager.get_plugins()
    [teller] = [one for one in plugins if type(one).__name__ == "_Teller"]
    unread = select.poll()
    unread.register(teller._connection.fileno(), 0)
    # The run has ended when nobody reads what this process reports.
    assert unread.poll(60_000)


def test_after_it():
    raise AssertionError
"""


def ran(folder: Path, **files: str) -> tuple[int, str]:
    """The exit status of a run of these files by two processes, and what it printed."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, code in files.items():
        (folder / f"test_{name}.py").write_text(code)
    options = ["-q", "-rs", "-p", "no:cacheprovider", f"--basetemp={folder / 'made'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_results_of_all_processes_are_reported(tmp_path: Path) -> None:
    status, said = ran(tmp_path, first=FIRST, second=SECOND)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 2 passed, 1 skipped" in said
    assert "assert 1 == 2" in said
    assert "what it says" in said
    assert "needs no other" in said
    assert len([*tmp_path.glob("made/process-*/shared0/torn down")]) == 2


def test_a_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    status, said = ran(tmp_path, killed=KILLED, waiting=WAITING)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "a process ended with -9 after setup of test_killed.py::test_that_ends_its" in said
    assert "failed," not in said
    assert len([*tmp_path.glob("made/process-*/shared0/torn down")]) == 1

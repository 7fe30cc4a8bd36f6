"""A disk that stops answering delays nobody for long."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from threading import Event
from time import monotonic, sleep

import pytest

from server import lookup
from server.lookup import Lookup

SHORT_S = 0.2


class Disk:
    """A disk that answers with a number, and only while it may."""

    def __init__(self) -> None:
        self.number = 1
        self.answers = Event()
        self.answers.set()
        self.looks = 0

    def look(self) -> int:
        self.looks += 1
        assert self.answers.wait(60)
        if self.number < 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return self.number


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(lookup, "PATIENCE_S", SHORT_S)
    made = Disk()
    yield made
    made.answers.set()


def test_each_look_sees_what_is_there_now(disk: Disk) -> None:
    looked = Lookup(disk.look, 0, "a disk")
    assert looked.latest() == 1
    disk.number = 2
    assert looked.latest() == 2


def test_while_a_disk_hangs_only_the_first_caller_waits_and_one_thread_looks(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    looked = Lookup(disk.look, 0, "a disk")
    looked.latest()
    disk.answers.clear()
    disk.number = 2
    assert looked.latest() == 1
    began = monotonic()
    assert [looked.latest() for _ in range(100)] == [1] * 100
    assert monotonic() - began < 50 * SHORT_S
    assert disk.looks == 2
    disk.answers.set()
    last = monotonic() + 60
    while looked.latest() != 2:
        assert monotonic() < last
        sleep(0.01)
    (record,) = caplog.records
    assert record.message.startswith("a disk: the disk does not answer")


def test_a_disk_that_answers_too_late_each_time_is_in_the_log_once(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise each request for a model that is not loaded would repeat it."""
    looked = Lookup(disk.look, 0, "a disk")
    for _ in range(3):
        disk.answers.clear()
        looked.latest()
        disk.answers.set()
        last = monotonic() + 60
        while looked._late is not None and looked._late.is_alive():
            assert monotonic() < last
            sleep(0.01)
    assert disk.looks == 3
    assert len(caplog.records) == 1
    assert looked.latest() == 1
    disk.answers.clear()
    looked.latest()
    assert len(caplog.records) == 2, "it had answered in time meanwhile"


def test_a_disk_that_fails_leaves_what_was_found_last_and_one_line_in_the_log(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    looked = Lookup(disk.look, 0, "a disk")
    looked.latest()
    disk.number = -1
    assert [looked.latest() for _ in range(3)] == [1, 1, 1]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "Stale file handle" in record.message
    disk.number = 2
    assert looked.latest() == 2

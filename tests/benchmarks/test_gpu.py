"""GPU measurements are stored part by part."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from benchmarks import gpu

if TYPE_CHECKING:
    import pytest

TESTS = Path(__file__).parents[1]


STARTS_WITHIN_S = (1, 10, 40)
"""Seconds after which a process is cut off; on a loaded machine, it may begin only then."""


def part(code: str) -> gpu.Part:
    return gpu.Part("A title", ("-c", "raise SystemExit(3)"), ("-c", code), 60)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str, **parts: gpu.Part) -> int:
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", "--folder", str(folder), "--rehearse", *options])
    return gpu.main()


def test_what_is_done_is_not_run_again_and_what_failed_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, one=part("print('first')"), two=part("raise KeyError")) == 1
    assert "failed" in (tmp_path / "index.md").read_text()
    assert not (tmp_path / "two.md").exists()
    assert "KeyError" in json.loads((tmp_path / "two.json").read_text())["stderr"]

    assert run(tmp_path, monkeypatch, one=part("print('again')"), two=part("print('now')")) == 0

    assert "first" in (tmp_path / "one.md").read_text()
    assert "now" in (tmp_path / "two.md").read_text()
    assert "failed" not in (tmp_path / "index.md").read_text()


def test_a_part_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, table = "print('begun'); import time; time.sleep(60)", ""
    for within_s in STARTS_WITHIN_S:
        folder = tmp_path / f"{within_s}"
        endless = gpu.Part("A title", (), ("-c", code), within_s)
        assert run(folder, monkeypatch, one=endless) == 1
        record = json.loads((folder / "one.json").read_text())
        assert record["code"] == gpu.CUT_OFF
        assert record["seconds"] < 60
        table = (folder / "one.md").read_text()
        assert "It was cut off there" in table
        assert "| [A title](one.md) | cut off |" in (folder / "index.md").read_text()
        if "begun" in table:
            break
    assert table.endswith("\n\nbegun\n")


def test_what_a_part_says_of_its_progress_is_kept_and_shown_and_what_it_started_ends_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = (
        "import subprocess, sys, time; sys.stderr.write('1.0 s: begun\\n'); "
        "subprocess.Popen(['sleep', '60']); time.sleep(60)"
    )
    began, progress, shown = monotonic(), "", ""
    for within_s in STARTS_WITHIN_S:
        status, told, progress = gpu.run_shown([sys.executable, "-c", code], within_s)
        assert (status, told) == (gpu.CUT_OFF, "")
        shown = capsys.readouterr().err
        if progress:
            break
    assert progress == shown == "1.0 s: begun\n"
    assert monotonic() - began < 60


def test_a_benchmark_is_told_how_long_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = replace(part("import sys; print(sys.argv[1:])"), within=True)
    assert run(tmp_path, monkeypatch, one=told) == 0
    assert "['--within', '55']" in (tmp_path / "one.md").read_text()


def test_a_part_may_be_given_other_seconds_than_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = replace(part("import sys; print(sys.argv[1:])"), within=True)
    only = "--only", "two=30", "one"
    assert run(tmp_path, monkeypatch, *only, one=told, two=told, three=part("raise KeyError")) == 0
    assert "['--within', '25']" in (tmp_path / "two.md").read_text()
    assert "['--within', '55']" in (tmp_path / "one.md").read_text()


def test_all_tests_that_need_cuda_are_run() -> None:
    marked = [file for file in TESTS.rglob("*.py") if "mark.cuda" in file.read_text()]
    marked.remove(Path(__file__))
    assert sorted(gpu.CUDA_TESTS) == sorted(
        file.relative_to(TESTS.parent).as_posix() for file in marked
    )


def test_all_parts_that_run_unnamed_may_be_done_in_25_minutes() -> None:
    unnamed = [part for part in gpu.PARTS.values() if not part.by_name]
    assert sum(part.seconds for part in unnamed) <= gpu.TIME_LIMIT_S == 25 * 60


def test_a_part_that_only_runs_by_name_is_left_out_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(part("raise KeyError"), by_name=True)
    assert run(tmp_path, monkeypatch, one=part("print(1)"), two=named) == 0
    assert not (tmp_path / "two.json").exists()
    assert "| A title | not measured |" in (tmp_path / "index.md").read_text()

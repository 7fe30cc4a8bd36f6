"""Benchmarks report their progress, and start nothing for which there is no time."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.allowance import Allowance
from benchmarks.compared import Figures
from benchmarks.peers import Outcome

if TYPE_CHECKING:
    import pytest

SLOW_IMPORTS = "import time; time.sleep(1); from benchmarks.allowance import Allowance; "


def test_what_there_is_no_time_for_is_left_out_and_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    allowance = Allowance(1e6)
    assert allowance.allows(1, "a short run")
    assert not allowance.allows(2e6, "a long run")
    assert allowance.report() == 0
    told = capsys.readouterr()
    assert told.out == "\nNo time was left for: a long run.\n"
    first, second = told.err.splitlines()
    assert re.fullmatch(r"[\d.]+ s: a short run", first)
    assert "no time for a long run" in second


def test_a_system_that_fails_is_reported_and_the_others_are_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    allowance = Allowance()
    assert allowance.attempt("a peer", lambda: {}["weights"]) is None
    assert allowance.attempt("another", lambda: 7) == 7
    assert allowance.report() == 1
    told = capsys.readouterr()
    assert told.out == "\nFailed: a peer.\n"
    assert "KeyError: 'weights'" in told.err


def test_imports_count() -> None:
    code = SLOW_IMPORTS + "Allowance().say('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 <= float(done.stderr.split(" s:")[0]) < 30


def test_a_run_that_was_cut_off_has_the_rate_of_the_evaluations_that_it_did() -> None:
    seconds = {"denoiser": 3.0, "decoder": 1.0, "rest": 1.0}
    whole = Figures.of(Outcome([1.0, 2.0], 4.0, seconds, [1, 1]), 2)
    half = Figures.of(Outcome([1.0], 2.0, seconds, [1], share=0.5), 2)
    assert whole.rate == half.rate == 0.5
    assert half.late == half.average == 1.0
    assert Figures.median([whole, half, whole]) == whole

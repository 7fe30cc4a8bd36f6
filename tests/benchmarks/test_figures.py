"""Figures printed by benchmarks are plausible."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from benchmarks.likeness import psnr
from benchmarks.liveness import percentiles
from benchmarks.promises.costs import delays, grown
from benchmarks.real_server import MIB

FEW = [0.001, 0.002, 8.0]
"""Fewer measurements than a hundred, one of them slow."""


def test_no_percentile_of_the_promises_is_above_the_maximum() -> None:
    outcome = delays(FEW, [0.001, 0.005])
    at_99, longest, before = map(int, re.findall(r"(\d+) ms", outcome.figure))
    assert longest == 8000
    assert 0.9 * longest < at_99 <= longest
    assert before <= 5
    assert not outcome.kept


def test_no_percentile_of_the_liveness_is_above_the_maximum() -> None:
    middle, at_99, longest = map(float, percentiles(FEW).split(" | "))
    assert (middle, longest) == (0.0, 8.0)
    assert 0.9 * longest < at_99 <= longest


def test_memory_that_grows_and_shrinks_has_one_sign() -> None:
    assert (grown(204 * MIB), grown(-57 * MIB)) == ("+204 MB", "-57 MB")


def test_pictures_that_differ_by_a_level_everywhere_are_at_48_decibels() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    assert psnr(grey + 1, grey) == pytest.approx(20 * math.log10(255))
    assert psnr(grey, grey) == pytest.approx(20 * math.log10(255) + 10 * math.log10(48))

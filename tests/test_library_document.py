"""What docs/library.md shows runs as it stands, and draws the picture beside it."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from samplers import DPMSolverPPSinglestep, NoiseSchedule
from samplers.testing import check_sampler

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/library.md").read_text("utf-8")


def example(of: str) -> CodeType:
    blocks = re.findall(r"(?:^    .*\n|^\n)+", DOCUMENT, re.MULTILINE)
    [block] = [block for block in blocks if of in block]
    text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    return compile(text, "docs/library.md", "exec", dont_inherit=True)


def test_the_example_of_the_library_draws_the_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        exec(example("import matplotlib"), names)  # noqa: S102
        drawn = {str(line.get_label()): line.get_xydata() for line in plt.gca().get_lines()}
    finally:
        plt.close("all")
    assert (tmp_path / "error.png").stat().st_size > 10_000
    for label, sampler in names["solvers"].items():
        evaluations, errors = np.log(np.asarray(drawn[label])[-2:]).T
        slope = -np.polyfit(evaluations, errors, 1)[0]
        assert slope == pytest.approx(sampler.convergence_order, abs=0.25), label


def test_the_sampler_with_two_evaluations_keeps_its_promises() -> None:
    names: dict[str, Any] = {"__name__": "midpoint"}
    exec(example("class Midpoint"), names)  # noqa: S102
    check_sampler(names["Midpoint"]())
    grid = NoiseSchedule.flow().grid("karras", 5)
    ours, known = names["Midpoint"]().plan(grid), DPMSolverPPSinglestep().plan(grid)
    np.testing.assert_allclose(ours.t, known.t)

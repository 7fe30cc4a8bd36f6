"""The examples on the pages about the libraries run as shown and produce the figures shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from torch import Tensor
from typing_extensions import override

from guidance import APG, CFG, CFGPlusPlus, Guided, Rows, Rule
from guidance.testing import check_policy
from samplers import DDIM, DPMSolverPPSinglestep, Heun, NoiseSchedule, Sampler, UniPC
from samplers.testing import check_sampler, check_spacing

ROOT = Path(__file__).parents[1]


def example(of: str, page: str = "docs/library.md") -> CodeType:
    document = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"(?:^    .*\n|^\n)+", document, re.MULTILINE)
    [block] = [block for block in blocks if of in block]
    text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    return compile(text, page, "exec", dont_inherit=True)


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


def test_the_spacing_of_the_page_keeps_its_promises() -> None:
    names: dict[str, Any] = {"__name__": "cosine"}
    exec(example("class Cosine"), names)  # noqa: S102
    check_spacing(names["Cosine"]())
    check_spacing(names["Cosine"](power=2.0))
    times = NoiseSchedule.vp_linear().grid(names["Cosine"](), 5, 1.0, 0.5).t
    np.testing.assert_allclose(
        times[2:4], [0.75 + 0.25 * c for c in np.cos([0.4 * np.pi, 0.6 * np.pi])]
    )


def test_the_policy_of_the_page_keeps_its_promises() -> None:
    names: dict[str, Any] = {"__name__": "ever_rarer"}
    exec(example("class EverRarer", "docs/guidance_library.md"), names)  # noqa: S102
    kind = names["EverRarer"]
    check_policy(kind(), kind(keep=0.5))
    asked = kind().evaluates(np.ones(12), np.arange(12) / 12)
    assert np.flatnonzero(asked).tolist() == [0, 1, 4, 9]


def test_rules_and_samplers_together_draw_what_diffusers_loop_does() -> None:
    page = "docs/guidance_library.md"
    [loop] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    theirs: dict[str, Any] = {}
    exec(loop, theirs)  # noqa: S102
    names: dict[str, Any] = {}
    exec(example("def draw(sampler", page), names)  # noqa: S102
    ours, evaluations = names["draw"](DDIM(), theirs["STEPS"], theirs["rule"], theirs["SEED"])
    assert evaluations == 2 * theirs["STEPS"]
    np.testing.assert_allclose(ours.numpy(), theirs["x"].numpy(), atol=1e-3)
    # A rule that moves x, with a sampler that takes two evaluations a step.
    moved, _ = names["draw"](Heun(), 3, CFGPlusPlus(), theirs["SEED"])
    kept, _ = names["draw"](Heun(), 3, Kept(), theirs["SEED"])
    assert float((moved - kept).abs().max()) > 0.1


class Kept(CFGPlusPlus, frozen=True):
    """CFG++ without its move of x."""

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return super().combine(rows, parameters)._replace(x=rows.x)


def test_the_sweep_of_the_page_spends_as_much_on_each_sampler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = "docs/guidance_library.md"

    def draw(sampler: Sampler, steps: int, rule: Rule, seed: int) -> tuple[int, int]:
        return seed, sampler.evaluations(steps) * (1 + len(rule.branches))

    names: dict[str, Any] = {"draw": draw}
    names |= {kind.__name__: kind for kind in (DDIM, UniPC, Heun, CFG, APG)}
    exec(example("for sampler in (DDIM(), UniPC(), Heun())", page), names)  # noqa: S102
    assert capsys.readouterr().out.splitlines() == [
        f"{sampler} {steps} {rule}"
        for sampler, steps in (("ddim", 9), ("unipc", 9), ("heun", 5))
        for rule in ("cfg 1.0 9", "apg 4.0 18")
    ]

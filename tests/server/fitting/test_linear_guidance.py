"""Linear adaptive guidance, from the fitting command to the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from guidance.always import Always
from guidance.apg import APG
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.linear_adaptive import TERMS, LinearAdaptive
from guidance.linear_fit import LinearFit
from guidance.perp_neg import PerpNeg
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.heun import Heun
from server.engine.task import ImageTask
from server.errors import InvalidRequest
from server.fitting.linear_guidance import Runs, fit, store
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.covering import spread
from tests.server.toy_model import FACTS, SCHEDULE, SIDE, Toy, run, started

PROMPTS = ["a red circle", "a blue square", "nothing at all"]


def quiet(*progress: object) -> None: ...


@pytest.mark.parametrize(
    ("sampler", "rule"),
    # CFG++ treats the two evaluations of a step of Heun's method differently.
    spread([DPMSolverPP(), Heun(), DDIM(eta=1.0)], [CFG(), CFGPlusPlus(), APG(), PerpNeg()]),
    ids=lambda one: one.name,
)
def test_the_runs_are_those_that_the_engine_makes(sampler, rule) -> None:
    """For the same prompt and seed, the network gets the same inputs at every stage."""
    plan = sampler.plan(SCHEDULE.grid(sampler.default_spacing, 8))
    fitted, served = Toy(), Toy()
    made = fit(fitted, plan, rule, LinearAdaptive(), ["a red circle"], Runs(1, seed=5), quiet)
    branches = len(rule.branches)
    assert made.coefficients.shape == (plan.evaluations, branches * TERMS)
    image = ImageTask(
        model="toy",
        prompt="a red circle",
        negative_prompt="",
        width=SIDE,
        height=SIDE,
        seed=5,
        plan=plan,
        rule=rule,
        policy=Always(),
    )
    engine = started(served, 8)
    try:
        served.seen.clear()
        assert run(engine, [image]).results[0].evaluations == (1 + branches) * plan.evaluations
    finally:
        engine.stop(0)
    for ours, theirs in zip(fitted.seen, served.seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chunks_make_no_difference() -> None:
    model = Toy()
    plan = DPMSolverPP().plan(SCHEDULE.grid("trailing", 4))
    once = fit(model, plan, CFG(), LinearAdaptive(), PROMPTS, Runs(6, chunk=2), quiet)
    again = fit(model, plan, CFG(), LinearAdaptive(), PROMPTS, Runs(6, chunk=5), quiet)
    assert np.allclose(once.coefficients, again.coefficients, rtol=1e-3, atol=1e-3)
    assert np.allclose(once.error, again.error, rtol=1e-3)
    assert once.identity == again.identity
    assert once.runs == 6
    assert {len(x) for x in model.seen} == {4, 10, 2}


def test_progress_is_told_and_the_file_found_again(tmp_path: Path) -> None:
    model, heard = Toy(), []
    guidance = {"name": "cfg", "policy": "linear_adaptive"}
    request = GenerateRequest.model_validate(
        {"prompt": "", "steps": 4, "sampler": "ddim", "guidance": guidance}
    )
    resolved = resolve(request, model, Limits(), None)
    file = store(
        model, tmp_path, resolved, PROMPTS, Runs(5, chunk=2), lambda *told: heard.append(told)
    )
    assert file.parent == tmp_path / "weft"
    assert file.name.startswith("linear-ag-ddim-4-")
    assert heard == [("runs", 2, 5), ("runs", 4, 5), ("runs", 5, 5)]
    made = LinearFit.load(file)
    assert made.identity.model == FACTS.denoiser
    assert made.coefficients.shape == (4, TERMS)


class Stopped(Exception):
    """Ends a run part way."""


def test_a_stopped_fit_goes_on_where_it_was(tmp_path: Path) -> None:
    guidance = {"name": "cfg", "policy": "linear_adaptive"}
    request = GenerateRequest.model_validate(
        {"prompt": "", "steps": 4, "sampler": "ddim", "guidance": guidance}
    )
    heard: list[int] = []

    def store_in(
        folder: Path, stop_at: int = 0, prompts: list[str] = PROMPTS, **facts: str
    ) -> LinearFit:
        def tell(_: str, done: int, __: int) -> None:
            heard.append(done)
            if done == stop_at:
                raise Stopped

        model = Toy(**facts)
        resolved = resolve(request, model, Limits(), None)
        heard.clear()
        return LinearFit.load(store(model, folder, resolved, prompts, Runs(6, chunk=2), tell))

    whole = store_in(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped):
        store_in(stopped, stop_at=4)
    (kept,) = (stopped / "weft").iterdir()
    part = kept.read_bytes()
    resumed = store_in(stopped)
    assert heard == [6]
    assert np.array_equal(resumed.coefficients, whole.coefficients)
    assert not kept.exists()
    # Another autoencoder changes none of the runs.
    kept.write_bytes(part)
    store_in(stopped, revision="another")
    assert heard == [6]
    # A damaged part is not continued, nor is one for other prompts or weights.
    kept.write_bytes(part[:-8])
    store_in(stopped)
    assert heard == [2, 4, 6]
    kept.write_bytes(part)
    store_in(stopped, prompts=PROMPTS[1:])
    assert heard == [2, 4, 6]
    kept.write_bytes(part)
    store_in(stopped, denoiser="another")
    assert heard == [2, 4, 6]


@pytest.mark.parametrize(
    ("guidance", "reason"),
    [
        (
            {"name": "cfg", "scale": 1.0, "policy": "linear_adaptive"},
            "does nothing",
        ),
        ({"name": "cfg", "policy": "reuse"}, "`weft linear-ag` fits linear_adaptive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(guidance, reason, tmp_path: Path) -> None:
    request = GenerateRequest.model_validate({"prompt": "", "steps": 4, "guidance": guidance})
    resolved = resolve(request, Toy(), Limits(), None)
    with pytest.raises(InvalidRequest, match=reason):
        store(Toy(), tmp_path, resolved, PROMPTS, Runs(1), quiet)
    assert not list(tmp_path.iterdir())


def test_no_runs_are_no_fit() -> None:
    plan = DDIM().plan(SCHEDULE.grid("trailing", 2))
    with pytest.raises(InvalidRequest, match="runs is 0; at least 1 is needed"):
        fit(Toy(), plan, CFG(), LinearAdaptive(), PROMPTS, Runs(0), quiet)


def test_the_runs_leave_no_gradients() -> None:
    assert torch.is_grad_enabled()
    fit(
        Toy(),
        DDIM().plan(SCHEDULE.grid("trailing", 2)),
        CFG(),
        LinearAdaptive(),
        PROMPTS,
        Runs(1),
        quiet,
    )
    assert torch.is_grad_enabled()

"""Linear adaptive guidance: the pattern, the estimate, and the fit."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from guidance.linear_adaptive import TERMS, WINDOW, LinearAdaptive
from guidance.linear_fit import FitIdentity, LinearFit, fingerprint, moments, residual, solve
from tests.guidance.cases import draw, with_other

PROGRESS = np.arange(10) / 10
ANY = np.ones(10)
SHAPE = (4, 6, 5)


def test_evaluations_alternate_with_estimates_and_then_guidance_ends() -> None:
    policy = LinearAdaptive()
    assert policy.evaluates(ANY, PROGRESS).tolist() == [True, False] * 2 + [True] + [False] * 5
    assert policy.estimated(ANY, PROGRESS).tolist() == [False, True] * 2 + [False] * 6


def test_both_stages_of_a_step_are_treated_alike() -> None:
    progress = np.repeat(np.arange(4) / 4, 2)
    policy = LinearAdaptive(every=3, stop=1)
    assert policy.evaluates(ANY, progress).tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert policy.estimated(ANY, progress).tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_the_estimate_is_the_weighted_sum_of_the_last_predictions() -> None:
    """A run of eight stages, against the sum written out over lists."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(8, TERMS))
    policy = LinearAdaptive(stop=1)
    evaluated = policy.evaluates(np.ones(8), np.arange(8) / 8)
    memory = torch.zeros(1, policy.memory_slots, *SHAPE, dtype=torch.float64)
    conds: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for stage in range(8):
        rows = draw(1, stage)
        conds.append(rows.cond)
        zero = torch.zeros_like(rows.cond)
        c = [conds[stage - k] if stage >= k else zero for k in range(WINDOW)]
        u = [others[stage - 1 - k] if stage > k else zero for k in range(WINDOW)]
        expected = sum(w * term for w, term in zip(weights[stage], c + u, strict=True))
        others.append(rows.other if evaluated[stage] else torch.as_tensor(expected))
        parameters = {"constants": torch.from_numpy(weights[stage]).view(1, TERMS, 1, 1, 1)}
        asked = torch.full((1, 1, 1, 1), bool(evaluated[stage]))
        other, memory = policy.fill(rows, memory, parameters, asked)
        torch.testing.assert_close(other, others[-1], rtol=1e-12, atol=1e-12)


def test_a_prediction_that_was_evaluated_passes_as_it_is() -> None:
    rows = draw(2)
    memory = torch.full((2, TERMS - 1, *SHAPE), torch.nan, dtype=torch.float64)
    parameters = {"constants": torch.ones(2, TERMS, 1, 1, 1, dtype=torch.float64)}
    asked = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    assert torch.equal(LinearAdaptive.fill(rows, memory, parameters, asked).other, rows.other)


def test_coefficients_must_be_those_of_the_run() -> None:
    right = np.ones((10, TERMS))
    assert LinearAdaptive().constants(10, right) is right
    for given in (None, np.ones((9, TERMS)), np.ones((10, TERMS + 1))):
        with pytest.raises(ValueError, match=r"guidance\.policy is 'linear_adaptive'; it needs"):
            LinearAdaptive().constants(10, given)


def test_weights_that_made_the_runs_are_found_again() -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(6, TERMS))
    cond, other = generator.normal(size=(2, 40, 6, 2, 3, 3))
    for i in range(WINDOW, 6):
        terms = [cond[:, i - k] for k in range(WINDOW)] + [
            other[:, i - 1 - k] for k in range(WINDOW)
        ]
        other[:, i] = sum(w * term for w, term in zip(weights[i], terms, strict=True))
    sums = moments(cond, other)
    found = solve(sums)
    assert np.allclose(found[WINDOW:], weights[WINDOW:], rtol=1e-8, atol=1e-8)
    assert residual(sums, found)[WINDOW:].max() < 1e-7


def test_the_fit_is_the_best_of_least_squares() -> None:
    generator = np.random.default_rng(2)
    cond, other = generator.normal(size=(2, 12, 5, 2, 3, 3))
    found = solve(moments(cond, other))
    for i in range(5):
        terms = [cond[:, i - k] for k in range(WINDOW) if i >= k]
        terms += [other[:, i - 1 - k] for k in range(WINDOW) if i > k]
        table = np.stack([term.ravel() for term in terms], 1)
        best, squared, *_ = np.linalg.lstsq(table, other[:, i].ravel(), rcond=None)
        assert np.allclose(found[i][found[i] != 0], best)
        whole = np.square(cond[:, i] - other[:, i]).sum()
        error = residual(moments(cond, other), found)[i]
        assert error == pytest.approx(float(np.sqrt(squared[0] / whole)))


def test_chunks_of_runs_add_up() -> None:
    cond, other = np.random.default_rng(3).normal(size=(2, 8, 5, 2, 3, 3))
    parts = moments(cond[:3], other[:3]) + moments(cond[3:], other[3:])
    assert np.allclose(parts, moments(cond, other))


def test_branches_that_agree_are_estimated_by_the_prompt_itself() -> None:
    cond = np.random.default_rng(4).normal(size=(8, 5, 2, 3, 3))
    sums = moments(cond, cond)
    found = solve(sums)
    rows = draw(1)
    rows = with_other(rows, torch.zeros_like(rows.cond))
    memory = torch.zeros(1, TERMS - 1, *SHAPE, dtype=torch.float64)
    parameters = {"constants": torch.from_numpy(found[0]).view(1, TERMS, 1, 1, 1)}
    asked = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    filled = LinearAdaptive.fill(rows, memory, parameters, asked)
    torch.testing.assert_close(filled.other, rows.cond)
    assert residual(sums, found).max() == 0


IDENTITY = FitIdentity(model="00ff", plan="aa11", rule='{"name": "cfg", "scale": 4.0}')
FIT = LinearFit(np.arange(12.0).reshape(2, 6), IDENTITY, 64, np.array([0.5, 0.25]))


def test_a_file_gives_back_what_was_saved(tmp_path) -> None:
    file = tmp_path / "weft" / "linear-ag.safetensors"
    FIT.save(file)
    again = LinearFit.load(file)
    assert np.array_equal(again.coefficients, FIT.coefficients)
    assert np.array_equal(again.error, FIT.error)
    assert (again.identity, again.runs) == (IDENTITY, 64)
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    file = tmp_path / "some.safetensors"
    sentence = r"some\.safetensors holds no coefficients of linear guidance\."
    with pytest.raises(ValueError, match=sentence):
        LinearFit.load(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=sentence):
        LinearFit.load(file)
    save_file({"coefficients": FIT.coefficients}, file)
    with pytest.raises(ValueError, match=sentence):
        LinearFit.load(file)
    save_file({"error": FIT.error}, file, {"format": "weft.linear_ag.1"})
    with pytest.raises(ValueError, match=sentence):
        LinearFit.load(file)


def test_a_fingerprint_follows_every_number() -> None:
    one, two = np.linspace(0, 1, 5), np.linspace(1, 2, 5)
    assert fingerprint(one, two) == fingerprint(one.copy(), two + 1e-9)
    assert fingerprint(one, two) != fingerprint(one, two + 1e-3)
    assert len(fingerprint(one)) == 16

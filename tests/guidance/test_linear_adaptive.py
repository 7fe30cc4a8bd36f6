"""Linear adaptive guidance: the pattern, the estimate, and the fit."""

import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from guidance.linear_adaptive import PAIRS, TERMS, LinearAdaptive
from guidance.linear_fit import FitIdentity, LinearFit, moments, residual, run_fingerprint, solve
from tests.guidance.cases import draw

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


@pytest.mark.parametrize(("every", "branches"), [(2, 1), (3, 1), (3, 2)])
def test_the_estimate_is_the_weighted_sum_of_what_was_evaluated(every: int, branches: int) -> None:
    """A run of ten stages compared with an explicit sum over lists, without reuse of estimates."""
    weights = np.random.default_rng(0).normal(size=(10, branches, TERMS))
    policy = LinearAdaptive(every=every, stop=1)
    slots = policy.memory_slots(branches)
    memory = torch.zeros(1, slots, *SHAPE, dtype=torch.float64)
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
    seen = [[zero] * 2 * PAIRS for _ in range(branches)]
    for stage, evaluated in enumerate(policy.evaluates(ANY, PROGRESS)):
        rows = draw(1, stage, branches=branches)
        constants = torch.from_numpy(weights[stage]).view(1, branches * TERMS, 1, 1, 1)
        asked = torch.full((1, 1, 1, 1), bool(evaluated))
        others, memory = policy.fill(rows, memory, {"constants": constants}, asked)
        for k in range(branches):
            known = [rows.cond, *seen[k][: 2 * PAIRS]]
            expected = sum((w * x for w, x in zip(weights[stage, k], known, strict=True)), zero)
            if evaluated:
                expected = rows.others[:, k]
                seen[k] = [rows.cond, rows.others[:, k], *seen[k]]
            torch.testing.assert_close(others[:, k], expected, rtol=1e-12, atol=1e-12)


def test_a_prediction_that_was_evaluated_passes_as_it_is() -> None:
    rows = draw(2)
    memory = torch.full((2, TERMS - 1, *SHAPE), torch.nan, dtype=torch.float64)
    parameters = {"constants": torch.ones(2, TERMS, 1, 1, 1, dtype=torch.float64)}
    asked = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    assert torch.equal(LinearAdaptive.fill(rows, memory, parameters, asked).others, rows.others)


def test_coefficients_must_be_those_of_the_run() -> None:
    right = np.ones((10, 2 * TERMS))
    assert LinearAdaptive().constants(10, 2, right) is right
    for given in (None, np.ones((9, 2 * TERMS)), np.ones((10, TERMS))):
        with pytest.raises(ValueError, match=r"guidance\.policy is 'linear_adaptive'; it needs"):
            LinearAdaptive().constants(10, 2, given)


PATTERN = np.array([True, False, False, True, False, True, False])


def known_at(cond: np.ndarray, other: np.ndarray, i: int) -> list[np.ndarray]:
    """The terms of an estimate at stage i."""
    last = [k for k in range(i - 1, -1, -1) if PATTERN[k]][:PAIRS]
    return [cond[:, i], *(branch[:, k] for k in last for branch in (cond, other))]


def test_weights_that_made_the_runs_are_found_again() -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(7, TERMS))
    cond, other = generator.normal(size=(2, 40, 7, 2, 3, 3))
    for i in np.flatnonzero(~PATTERN).tolist():
        known = known_at(cond, other, i)
        other[:, i] = sum(w * term for w, term in zip(weights[i], known, strict=False))
    sums = moments(cond, other, PATTERN)
    found = solve(sums)
    assert np.allclose(found[1:3, :3], weights[1:3, :3], rtol=1e-8, atol=1e-8)
    assert np.allclose(found[[4, 6]], weights[[4, 6]], rtol=1e-8, atol=1e-8)
    assert not found[PATTERN].any()
    assert residual(sums, found).max() < 1e-7


def test_the_fit_is_the_best_of_least_squares() -> None:
    cond, other = np.random.default_rng(2).normal(size=(2, 12, 7, 2, 3, 3))
    sums = moments(cond, other, PATTERN)
    found = solve(sums)
    for i in np.flatnonzero(~PATTERN).tolist():
        table = np.stack([term.ravel() for term in known_at(cond, other, i)], 1)
        best, squared, *_ = np.linalg.lstsq(table, other[:, i].ravel(), rcond=None)
        assert np.allclose(found[i][found[i] != 0], best)
        whole = np.square(cond[:, i] - other[:, i]).sum()
        assert residual(sums, found)[i] == pytest.approx(float(np.sqrt(squared[0] / whole)))


def test_chunks_of_runs_add_up() -> None:
    cond, other = np.random.default_rng(3).normal(size=(2, 8, 7, 2, 3, 3))
    parts = moments(cond[:3], other[:3], PATTERN) + moments(cond[3:], other[3:], PATTERN)
    assert np.allclose(parts, moments(cond, other, PATTERN))


def test_branches_that_agree_are_estimated_by_the_prompt_itself() -> None:
    cond = np.random.default_rng(4).normal(size=(8, 7, 2, 3, 3))
    sums = moments(cond, cond, PATTERN)
    found = solve(sums)
    assert residual(sums, found).max() < 1e-7
    rows = draw(1)
    memory = torch.zeros(1, TERMS - 1, *SHAPE, dtype=torch.float64)
    weights = np.array([found[1, 0], *found[1, 1:]])
    parameters = {"constants": torch.from_numpy(weights).view(1, TERMS, 1, 1, 1)}
    asked = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    filled = LinearAdaptive.fill(rows, memory, parameters, asked)
    torch.testing.assert_close(filled.others[:, 0], rows.cond)


IDENTITY = FitIdentity(model="00ff", plan="aa11", rule='{"name": "cfg", "scale": 4.0}', every=2)
FIT = LinearFit(np.arange(10.0).reshape(2, 5), IDENTITY, 64, np.array([0.5, 0.25]))


def test_a_file_gives_back_what_was_saved(tmp_path, mode_of_files: int) -> None:
    file = tmp_path / "weft" / "linear-ag.safetensors"
    file.parent.mkdir()
    # As a stopped run may leave it.
    file.with_name(f".{file.name}.writing").touch(0o600)
    FIT.save(file)
    again = LinearFit.load(file)
    assert np.array_equal(again.coefficients, FIT.coefficients)
    assert np.array_equal(again.error, FIT.error)
    assert (again.identity, again.runs) == (IDENTITY, 64)
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert stat.S_IMODE(file.stat().st_mode) == mode_of_files


def test_what_fits_are_for_tells_their_files_apart() -> None:
    digests = {
        IDENTITY.digest,
        replace(IDENTITY, plan="bb").digest,
        replace(IDENTITY, rule="{}").digest,
        replace(IDENTITY, every=3).digest,
    }
    assert len(digests) == 4


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    file = tmp_path / "some.safetensors"
    sentence = r"some\.safetensors contains no coefficients of linear guidance\."
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
    assert run_fingerprint(one, two) == run_fingerprint(one.copy(), two + 1e-9)
    assert run_fingerprint(one, two) != run_fingerprint(one, two + 1e-3)
    assert len(run_fingerprint(one)) == 16

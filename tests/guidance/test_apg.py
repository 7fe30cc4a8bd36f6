"""Adaptive projected guidance compared with the paper and with another implementation."""

from dataclasses import replace

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance import Rows
from guidance.apg import APG, REFERENCE_ELEMENTS
from guidance.cfg import CFG
from tests.guidance.cases import apply, draw, one_row, with_memory


def start(rows: int, seed: int = 0) -> Rows:
    """Rows at the beginning of a run, with empty memory."""
    fresh = with_memory(draw(rows, seed), 1)
    return replace(fresh, memory=torch.zeros_like(fresh.memory))


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def push(rule: APG, rows: Rows) -> Tensor:
    """What the rule adds to the prompt's prediction, at a scale of 2."""
    return apply(rule.model_copy(update={"scale": 2.0}), rows).denoised - rows.cond


@given(scale=st.floats(0, 100), seed=st.integers(0, 100))
def test_with_all_kept_it_is_cfg(scale: float, seed: int) -> None:
    rows = start(3, seed)
    plain = APG(scale=scale, eta=1, momentum=0, norm_threshold=0)
    torch.testing.assert_close(
        apply(plain, rows).denoised, apply(CFG(scale=scale), rows).denoised, rtol=1e-9, atol=1e-9
    )


def test_without_the_parallel_part_the_push_is_orthogonal_to_the_prediction() -> None:
    rows = with_memory(draw(5), 1)
    added = push(APG(eta=0), rows)
    lengths = added.flatten(1).norm(dim=1) * rows.cond.flatten(1).norm(dim=1)
    assert (inner(added, rows.cond).abs() < 1e-13 * lengths).all()
    assert (added.flatten(1).norm(dim=1) > 0.01).all()


def test_eta_weighs_the_parallel_part_alone() -> None:
    rows = start(4)
    none, half, all_of_it = (push(APG(eta=eta), rows) for eta in (0, 0.5, 1))
    torch.testing.assert_close(half, (none + all_of_it) / 2)
    along = all_of_it - none
    share = inner(along, rows.cond) / inner(rows.cond, rows.cond)
    torch.testing.assert_close(along, share.view(-1, 1, 1, 1) * rows.cond)


@given(threshold=st.floats(0.1, 1000), seed=st.integers(0, 100))
def test_the_norm_bound_holds_at_any_size(threshold: float, seed: int) -> None:
    rows = start(3, seed)
    added = push(APG(eta=1, momentum=0, norm_threshold=threshold), rows)
    bound = threshold * (rows.cond[0].numel() / REFERENCE_ELEMENTS) ** 0.5
    free = (rows.cond - rows.other).flatten(1).norm(dim=1)
    expected = free.clamp(max=bound)
    torch.testing.assert_close(added.flatten(1).norm(dim=1), expected, rtol=1e-6, atol=1e-9)


def test_the_reference_size_is_a_latent_of_sdxl() -> None:
    assert REFERENCE_ELEMENTS == 4 * 128 * 128


@pytest.mark.parametrize("momentum", [-0.75, -0.5, 0.0, 0.6])
def test_several_steps_follow_algorithm_1(momentum: float) -> None:
    """Compared with diffusers' function, one image at a time, on denoised predictions."""
    steps = [draw(2, seed) for seed in range(5)]
    setting = {"scale": 7.0, "eta": 0.3, "momentum": momentum, "norm_threshold": 20.0}
    rule = APG.model_validate(setting)
    bound = 20.0 * (steps[0].cond[0].numel() / REFERENCE_ELEMENTS) ** 0.5
    memory = start(2).memory
    buffers = [MomentumBuffer(momentum) for _ in range(2)]
    for rows in steps:
        result = apply(rule, replace(rows, memory=memory))
        for i, buffer in enumerate(buffers):
            own = one_row(rows, i)
            theirs = normalized_guidance(
                own.cond, own.other, 6.0, buffer, 0.3, bound, use_original_formulation=True
            )
            torch.testing.assert_close(result.denoised[i : i + 1], theirs, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(result.memory[i], buffer.running_average)
        memory = result.memory


def test_momentum_is_a_geometric_sum_of_the_differences() -> None:
    differences: list[Tensor] = []
    memory = start(1).memory
    for seed in range(4):
        rows = draw(1, seed)
        differences.append(rows.cond - rows.other)
        memory = apply(APG(momentum=-0.5), replace(rows, memory=memory)).memory
    expected = sum((-0.5) ** (3 - i) * d for i, d in enumerate(differences))
    torch.testing.assert_close(memory[:, 0], expected)


def test_memory_moves_once_in_a_step_of_two_evaluations() -> None:
    first, second = draw(2, 0), draw(2, 1)
    opening = torch.zeros(2, 1, 1, 1, dtype=torch.bool)
    before = with_memory(first, 1).memory
    rule = APG(momentum=-0.5)
    result = apply(rule, replace(first, memory=before, closes_step=opening))
    torch.testing.assert_close(result.memory, before)
    # But the momentum acts in both evaluations.
    still = apply(rule, replace(first, memory=torch.zeros_like(before), closes_step=opening))
    assert not torch.equal(result.denoised, still.denoised)
    result = apply(rule, replace(second, memory=result.memory))
    torch.testing.assert_close(result.memory[:, 0], second.cond - second.other - 0.5 * before[:, 0])


def test_a_prediction_of_zeros_has_no_parallel_part() -> None:
    rows = start(2)
    rows = replace(rows, cond=torch.zeros_like(rows.cond))
    rule = APG(scale=3, eta=0, momentum=0, norm_threshold=0)
    torch.testing.assert_close(apply(rule, rows).denoised, -2 * rows.other)


def test_reductions_keep_their_digits_in_float32() -> None:
    rows = start(3)
    half = Rows(
        **{
            name: v.float() if (v := getattr(rows, name)).is_floating_point() else v
            for name in Rows.__slots__
        }
    )
    rule = APG(scale=30, momentum=-0.5)
    exact, single = apply(rule, rows).denoised, apply(rule, half).denoised
    assert single.dtype == torch.float32
    assert float((single - exact).norm() / exact.norm()) < 2e-7

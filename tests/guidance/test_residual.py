"""Residual guidance compared with StreamDiffusion's recursion of its stock noise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance import Rows
from guidance.cfg import CFG
from guidance.residual import Residual
from tests.guidance.cases import apply, draw

SHAPE = (2, 3, 4, 4)
GAMMA = 1.2
ALPHA = np.array([0.25, 0.5, 0.75, 0.93])
SIGMA = np.sqrt(1 - ALPHA**2)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eps_of_prompt(x: Tensor, i: int) -> Tensor:
    return torch.tanh(0.8 * x + 0.1 * i)


def eps_of_negative(x: Tensor) -> Tensor:
    return torch.tanh(0.5 * x - 0.4)


def published(x: Tensor, stock: Tensor, delta: float, fresh: Callable[[int], Tensor]) -> Tensor:
    """The authors' pipeline: four steps of consistency sampling with the boundary terms at 1, 0.

    The stock noise takes the place of the second prediction. After a step it is renewed as the
    fresh noise plus the remainder of the step, scaled to the next level.
    """
    for i in range(4):
        a, s = ALPHA[i], SIGMA[i]
        second = stock * delta
        guided = second + GAMMA * (eps_of_prompt(x, i) - second)
        denoised = (x - s * guided) / a
        if i == 3:
            return denoised
        moved = (s * stock - s * guided) / a
        stock = fresh(i + 1) + ALPHA[i + 1] * moved / SIGMA[i + 1]
        x = ALPHA[i + 1] * denoised + SIGMA[i + 1] * fresh(i + 1)
    raise AssertionError("unreachable")


def ours(
    x: Tensor, memory: Tensor, policy: Residual, fresh: Callable[[int], Tensor]
) -> tuple[Tensor, list[bool]]:
    """The same run with our policy and CFG."""
    evaluated = policy.evaluates(SIGMA / ALPHA, np.arange(4) / 4)
    estimated = policy.estimated(SIGMA / ALPHA, np.arange(4) / 4)
    assert (evaluated ^ estimated).all()
    ones, denoised = x.new_ones(2, 1, 1, 1), x
    always = ones > 0
    for i in range(4):
        a, s = ALPHA[i] * ones, SIGMA[i] * ones
        cond = (x - s * eps_of_prompt(x, i)) / a
        other = (x - s * eps_of_negative(x)) / a if evaluated[i] else torch.full_like(x, torch.nan)
        rows = Rows(cond, other[:, None], x, a, s, 0 * ones, x[:, None, :0], always, always)
        asked = torch.full((2, 1, 1, 1), bool(evaluated[i]))
        parameters = policy.parameters([policy, policy], x[:1])
        filled = policy.fill(rows, memory, parameters, asked)
        memory = filled.memory
        rows = replace(rows, others=filled.others)
        denoised = apply(CFG(scale=GAMMA), rows).denoised
        if i < 3:
            x = ALPHA[i + 1] * denoised + SIGMA[i + 1] * fresh(i + 1)
    return denoised, evaluated.tolist()


@pytest.mark.parametrize("delta", [1.0, 0.6, 0.0])
def test_self_is_the_published_recursion_from_the_input_picture(delta: float) -> None:
    picture, noise = normal(0), normal(1)
    x = ALPHA[0] * picture + SIGMA[0] * noise
    policy = Residual(mode="self", delta=delta)
    assert policy.wants_reference
    result, evaluated = ours(x, picture[:, None], policy, lambda i: normal(10 + i))
    expected = published(x, noise, delta, lambda i: normal(10 + i))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert evaluated == [False] * 4


@pytest.mark.parametrize("delta", [1.0, 0.6])
def test_onetime_is_the_published_recursion_from_one_evaluation(delta: float) -> None:
    x = normal(2)
    policy = Residual(mode="onetime", delta=delta)
    assert not policy.wants_reference
    zero = torch.zeros_like(x)[:, None]
    result, evaluated = ours(x, zero, policy, lambda i: normal(10 + i))
    expected = published(x, eps_of_negative(x), delta, lambda i: normal(10 + i))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert evaluated == [True, False, False, False]


@pytest.mark.parametrize("mode", ["self", "onetime"])
def test_at_pure_noise_the_reference_itself_stands_in(mode: Literal["self", "onetime"]) -> None:
    rows = draw(2)
    rows = Rows(
        **{name: getattr(rows, name) for name in Rows.__slots__ if name != "alpha"},
        alpha=torch.zeros_like(rows.alpha),
    )
    policy = Residual(mode=mode, delta=0.5)
    kept = rows.cond[:, None] + 1
    asked = torch.zeros(2, 1, 1, 1, dtype=torch.bool)
    parameters = policy.parameters([policy] * 2, rows.x[:1])
    assert torch.equal(policy.fill(rows, kept, parameters, asked).others, kept)


def test_a_picture_stands_for_one_branch_and_evaluations_for_any() -> None:
    assert Residual(mode="self").most_branches == 1
    assert Residual(mode="onetime").most_branches is None

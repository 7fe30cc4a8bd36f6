"""Rescaled guidance compared with diffusers and the paper's formula, in each space."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance import Rows
from guidance.cfg import CFG
from guidance.cfg_rescale import CFGRescale
from tests.covering import few_of
from tests.guidance.cases import apply, draw

Space = Literal["velocity", "noise", "denoised"]
each_space = pytest.mark.parametrize("space", get_args(Space))


def to_space(
    rows: Rows, space: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Convert denoised predictions to the rescaled space and back at variance-preserving levels."""
    x, alpha, sigma = rows.x, rows.alpha, rows.sigma
    return {
        "noise": (lambda D: (x - alpha * D) / sigma, lambda eps: (x - sigma * eps) / alpha),
        "velocity": (
            lambda D: alpha * (x - alpha * D) / sigma - sigma * D,
            lambda v: alpha * x - sigma * v,
        ),
        "denoised": (lambda D: D, lambda D: D),
    }[space]


@each_space
@pytest.mark.parametrize("rescale", few_of([0.0, 0.3, 0.7, 1.0], [0.0, 0.7]))
def test_each_space_is_diffusers_on_a_network_that_predicts_it(
    space: Space, rescale: float
) -> None:
    rows = draw(4)
    there, back = to_space(rows, space)
    cond, other = there(rows.cond), there(rows.other)
    expected = rescale_noise_cfg(other + 7.5 * (cond - other), cond, rescale)
    result = apply(CFGRescale(scale=7.5, rescale=rescale, space=space), rows)
    torch.testing.assert_close(result.denoised, back(expected), rtol=1e-10, atol=1e-10)


@each_space
def test_all_of_it_has_the_spread_of_the_prompts_prediction(space: Space) -> None:
    rows = draw(4)
    there, _ = to_space(rows, space)
    result = apply(CFGRescale(scale=9, rescale=1, space=space), rows)
    spread = there(result.denoised).flatten(1).std(1)
    torch.testing.assert_close(spread, there(rows.cond).flatten(1).std(1))


@given(scale=st.floats(0, 100), seed=st.integers(0, 100))
def test_without_rescaling_it_is_cfg(scale: float, seed: int) -> None:
    rows = draw(3, seed)
    ours, plain = (
        apply(rule, rows).denoised
        for rule in (CFGRescale(scale=scale, rescale=0), CFG(scale=scale))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_spaces_differ() -> None:
    rows = draw(1)
    results = [apply(CFGRescale(space=s), rows).denoised for s in ("noise", "velocity", "denoised")]
    for one, another in pairwise(results):
        assert float((one - another).abs().max()) > 0.01


def test_velocity_is_that_of_flow_matching_there() -> None:
    sigma = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64).view(-1, 1, 1, 1)
    rows = replace(draw(3), alpha=1 - sigma, sigma=sigma)
    cond, other = ((rows.x - D) / sigma for D in (rows.cond, rows.other))
    expected = rows.x - sigma * rescale_noise_cfg(other + 5 * (cond - other), cond, 0.7)
    torch.testing.assert_close(apply(CFGRescale(scale=5), rows).denoised, expected)


def test_at_pure_noise_the_noise_space_has_the_limit() -> None:
    """There all noise predictions equal x, so the limit depends on how they start to differ."""
    rows = draw(3)
    zero, nearly = torch.zeros_like(rows.alpha), torch.full_like(rows.alpha, 1e-7)
    rule = CFGRescale(scale=5, space="noise")
    at, close = (
        apply(rule, replace(rows, alpha=a, sigma=torch.ones_like(a))).denoised
        for a in (zero, nearly)
    )
    torch.testing.assert_close(at, close, rtol=1e-5, atol=1e-5)


def test_a_prediction_without_spread_is_cfg() -> None:
    rows = draw(2)
    rows = replace(rows, cond=torch.ones_like(rows.cond), others=torch.zeros_like(rows.others))
    result = apply(CFGRescale(scale=3, space="denoised"), rows)
    torch.testing.assert_close(result.denoised, apply(CFG(scale=3), rows).denoised)


def test_rows_of_different_spaces_share_a_call() -> None:
    rows = draw(3)
    rules = [CFGRescale(space=s) for s in ("noise", "velocity", "denoised")]
    together = CFGRescale.combine(rows, CFGRescale.parameters(rules, rows.x[:1])).denoised
    for i, rule in enumerate(rules):
        torch.testing.assert_close(together[i], apply(rule, rows).denoised[i])

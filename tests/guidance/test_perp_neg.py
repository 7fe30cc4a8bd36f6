"""Perp-Neg compared with its formula, and what it must preserve of the prompt."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidance import EMPTY, NEGATIVE, Rows
from guidance.cfg import CFG
from guidance.perp_neg import PerpNeg
from tests.guidance.cases import apply, draw


def of_empty(rows: Rows) -> Rows:
    return replace(rows, others=rows.others[:, :1])


@pytest.mark.parametrize("negative", [0.5, 1.0, 3.0])
def test_it_is_the_formula_for_each_row(negative: float) -> None:
    """In noise space, as published; the result does not depend on the space."""
    rows = draw(4, branches=2)
    result = apply(PerpNeg(scale=6, negative=negative), rows).denoised
    for i in range(4):
        empty, against = rows.others[i]
        eps, eps_e, eps_n = (
            (rows.x[i] - rows.alpha[i] * D) / rows.sigma[i] for D in (rows.cond[i], empty, against)
        )
        p, n = eps - eps_e, eps_n - eps_e
        across = n - (n * p).sum() / (p * p).sum() * p
        guided = eps_e + 6 * (p - negative * across)
        expected = (rows.x[i] - rows.sigma[i] * guided) / rows.alpha[i]
        torch.testing.assert_close(result[i], expected, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 100), weight=st.floats(-5, 5))
def test_a_negative_prompt_along_the_prompt_takes_nothing(seed: int, weight: float) -> None:
    rows = draw(2, seed, branches=2)
    empty = rows.others[:, 0]
    others = torch.stack([empty, empty + weight * (rows.cond - empty)], 1)
    torch.testing.assert_close(
        apply(PerpNeg(scale=5), replace(rows, others=others)).denoised,
        apply(CFG(scale=5), of_empty(rows)).denoised,
    )


def test_the_share_along_the_prompt_does_not_depend_on_the_negative_prompt() -> None:
    rows = draw(3, branches=2)
    p = rows.cond - rows.others[:, 0]
    without, with_it = (
        apply(PerpNeg(scale=5, negative=k), rows).denoised - rows.others[:, 0] for k in (0, 2)
    )
    shares = [(push * p).flatten(1).sum(1) for push in (without, with_it)]
    torch.testing.assert_close(*shares)
    assert not torch.allclose(without, with_it)


def test_without_weight_it_is_cfg_from_the_empty_prompt_and_needs_nothing_else() -> None:
    rule, rows = PerpNeg(scale=5, negative=0), of_empty(draw(3, branches=2))
    assert rule.branches == (EMPTY,)
    torch.testing.assert_close(apply(rule, rows).denoised, apply(CFG(scale=5), rows).denoised)


@pytest.mark.parametrize(
    ("scale", "negative", "branches"),
    [
        (7.5, 1.0, (EMPTY, NEGATIVE)),
        (1.0, 1.0, (EMPTY, NEGATIVE)),
        (1.0, 0.0, ()),
        (0.0, 1.0, (EMPTY,)),
    ],
)
def test_branches_are_those_that_matter(scale: float, negative: float, branches: object) -> None:
    assert PerpNeg(scale=scale, negative=negative).branches == branches


def test_a_prompt_that_says_nothing_leaves_all_of_the_negative_prompt_across() -> None:
    rows = draw(2, branches=2)
    rows = replace(rows, cond=rows.others[:, 0])
    expected = rows.cond - 5 * (rows.others[:, 1] - rows.cond)
    torch.testing.assert_close(apply(PerpNeg(scale=5), rows).denoised, expected)

"""Classifier-free guidance, and no guidance."""

import pytest
import torch

from guidance import RULES
from guidance.cfg import CFG
from guidance.unguided import Unguided
from tests.guidance.cases import apply, draw


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0, 100.0])
def test_it_is_the_published_formula_in_noise_space(scale: float) -> None:
    """eps = (1 + w) eps_c - w eps_u, with the scale 1 + w; the space makes no difference."""
    rows = draw(3)
    cond, other = ((rows.x - rows.alpha * D) / rows.sigma for D in (rows.cond, rows.other))
    w = scale - 1
    eps = (1 + w) * cond - w * other
    result = apply(CFG(scale=scale), rows)
    denoised = (rows.x - rows.sigma * eps) / rows.alpha
    torch.testing.assert_close(result.denoised, denoised, rtol=1e-9, atol=1e-9)
    assert result.x is rows.x


def test_scale_one_is_the_prompt_and_scale_zero_the_other() -> None:
    rows = draw(2)
    assert torch.equal(apply(CFG(scale=1), rows).denoised, rows.cond)
    torch.testing.assert_close(apply(CFG(scale=0), rows).denoised, rows.other)


def test_unguided_is_the_prompt_alone() -> None:
    rows = draw(2)
    result = apply(Unguided(), rows)
    assert result.denoised is rows.cond
    assert result.x is rows.x
    assert not Unguided().branches
    assert not Unguided.combines


def test_rules_that_call_themselves_plain_cfg_are_cfg() -> None:
    plain = [kind for kind in RULES if kind.plain_cfg]
    assert CFG in plain
    rows = draw(3)
    expected = rows.other + 3.5 * (rows.cond - rows.other)
    for kind in plain:
        result = apply(kind.model_validate({"scale": 3.5}), rows)
        torch.testing.assert_close(result.denoised, expected)

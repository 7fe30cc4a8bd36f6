"""Rules in a caller's own sampling loop."""

import pytest
import torch

from guidance import Rule
from guidance.apg import APG
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.cfg_zero_star import CFGZeroStar
from guidance.loop import guide
from guidance.perp_neg import PerpNeg
from guidance.unguided import Unguided
from tests.guidance.cases import apply, draw, with_memory

ALPHA, SIGMA = 0.6, 0.8


@pytest.mark.parametrize(
    "rule", [CFG(), APG(), CFGPlusPlus(), CFGZeroStar(), PerpNeg()], ids=lambda r: r.name
)
@pytest.mark.parametrize(("opens_step", "closes_step"), [(True, False), (False, True)])
def test_it_is_the_rule_with_all_rows_alike(
    rule: Rule, opens_step: bool, closes_step: bool
) -> None:
    rows = with_memory(draw(3, branches=len(rule.branches)), rule.memory_slots)
    full = torch.ones_like(rows.alpha)
    rows = type(rows)(
        rows.cond,
        rows.others,
        rows.x,
        ALPHA * full,
        SIGMA * full,
        0.02 * full,
        rows.memory,
        torch.full_like(full, opens_step, dtype=torch.bool),
        torch.full_like(full, closes_step, dtype=torch.bool),
    )
    ours = guide(
        rule,
        rows.cond,
        rows.others.unbind(1),
        rows.x,
        ALPHA,
        SIGMA,
        progress=0.02,
        memory=rows.memory,
        opens_step=opens_step,
        closes_step=closes_step,
    )
    for one, other in zip(ours, apply(rule, rows), strict=True):
        torch.testing.assert_close(one, other)


def test_memory_begins_at_zero_and_is_handed_on() -> None:
    first, second = draw(2, 0), draw(2, 1)
    opened = guide(APG(), first.cond, [first.other], first.x, ALPHA, SIGMA)
    assert opened.memory.shape == (2, 1, *first.x.shape[1:])
    next_one = guide(
        APG(), second.cond, [second.other], second.x, ALPHA, SIGMA, memory=opened.memory
    )
    expected = second.cond - second.other - 0.5 * (first.cond - first.other)
    torch.testing.assert_close(next_one.memory[:, 0], expected)


@pytest.mark.parametrize("rule", [Unguided(), CFG(scale=1)], ids=lambda r: r.name)
def test_a_rule_without_branches_gives_the_prompts_prediction(rule: Rule) -> None:
    rows = draw(2)
    result = guide(rule, rows.cond, [], rows.x, ALPHA, SIGMA)
    assert result.denoised is rows.cond
    assert result.x is rows.x


def test_a_missing_prediction_is_named() -> None:
    rows = draw(2)
    with pytest.raises(ValueError, match="others has 1 predictions; perp_neg needs 2"):
        guide(PerpNeg(), rows.cond, [rows.other], rows.x, ALPHA, SIGMA)

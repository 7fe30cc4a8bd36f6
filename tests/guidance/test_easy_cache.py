"""EasyCache on numbers that are known independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guidance import EasyCache
from guidance.step_cache import Evaluation


def at(*values: float) -> torch.Tensor:
    """Rows of one value each, ``[rows, 1, 2, 2]``."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_of_a_linear_network_the_predicted_change_is_the_change() -> None:
    """For v = 3 x the rate is 3, and from x = 4 to 5 and 6 v changes by 1 / 4 and 2 / 4."""
    before, now = Evaluation(at(2.0), at(6.0)), Evaluation(at(4.0), at(12.0))
    numbers = EasyCache.learned(before, now)
    parameters = EasyCache.parameters([EasyCache(threshold=0.5)], now.x)
    first = EasyCache.decide(now, numbers, at(4.0), at(5.0), parameters)
    second = EasyCache.decide(now, first.numbers, at(5.0), at(6.0), parameters)
    assert [*map(bool, (first.recalls, second.recalls))] == [True, False]
    assert numbers.tolist() == [[3.0, 0.0]]
    assert [one.numbers.tolist() for one in (first, second)] == [[[3.0, 0.25]], [[3.0, 0.5]]]


def test_each_row_is_decided_by_its_own_threshold() -> None:
    now = Evaluation(at(4.0, 4.0, 4.0), at(12.0, 12.0, 12.0))
    numbers = EasyCache.learned(Evaluation(at(2.0, 2.0, 3.9), at(6.0, 6.0, 6.0)), now)
    settings = [EasyCache(threshold=limit) for limit in (0.3, 0.2, 1.0)]
    following = at(5.0, 5.0, 5.0)
    decision = EasyCache.decide(
        now, numbers, now.x, following, EasyCache.parameters(settings, now.x)
    )
    assert decision.recalls.tolist() == [True, False, False]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_without_a_rate_the_network_is_evaluated(threshold: float) -> None:
    """If x has not changed between two evaluations, there is no rate."""
    now = Evaluation(at(4.0), at(12.0))
    numbers = EasyCache.learned(now, now)
    parameters = EasyCache.parameters([EasyCache(threshold=threshold)], now.x)
    assert not EasyCache.decide(now, numbers, now.x, at(4.1), parameters).recalls.any()


def test_what_is_recalled_moves_with_the_input() -> None:
    last = Evaluation(at(4.0), at(12.0))
    assert torch.equal(EasyCache.recalled(last, at(4.5)), at(12.5))


def test_the_first_two_evaluations_and_the_last_are_made_and_all_outside_the_window() -> None:
    progress = np.linspace(0, 0.9, 10)
    ratio = np.logspace(0, -9, 10)
    anywhere = EasyCache(start=0).may_recall(ratio, progress)
    assert np.flatnonzero(anywhere).tolist() == [2, 3, 4, 5, 6, 7, 8]
    inside = EasyCache(start=0.4, stop=0.8, low=1e-7).may_recall(ratio, progress)
    assert np.flatnonzero(inside).tolist() == [4, 5, 6]

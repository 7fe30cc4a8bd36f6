"""Reuse of the last difference for some steps."""

from dataclasses import replace

import numpy as np
import torch

from guidance.reuse import Reuse
from tests.guidance.cases import draw

ANY = np.ones(7)
YES, NO = torch.ones(2, 1, 1, 1, dtype=torch.bool), torch.zeros(2, 1, 1, 1, dtype=torch.bool)


def test_it_evaluates_every_so_many_steps_and_estimates_between() -> None:
    policy = Reuse(every=3)
    assert policy.evaluates(ANY, np.arange(7) / 7).tolist() == [True, False, False] * 2 + [True]
    assert policy.estimated(ANY, np.arange(7) / 7).tolist() == [False, True, True] * 2 + [False]
    assert Reuse(every=1).evaluates(ANY, np.arange(7) / 7).all()


def test_both_stages_of_a_step_are_evaluated() -> None:
    progress = np.array([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75])
    assert Reuse().evaluates(ANY, progress).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]


def test_the_difference_of_velocities_is_what_stays() -> None:
    """v = alpha eps - sigma D, computed here from the predictions themselves."""
    first, second = draw(2, 0), draw(2, 1)
    none = torch.zeros(2, 1, *first.cond.shape[1:], dtype=torch.float64)
    evaluated = Reuse.fill(first, none, {}, YES)
    assert torch.equal(evaluated.others, first.others)
    estimated = Reuse.fill(second, evaluated.memory, {}, NO)

    def velocity(rows, denoised):
        return rows.alpha * (rows.x - rows.alpha * denoised) / rows.sigma - rows.sigma * denoised

    before = velocity(first, first.cond) - velocity(first, first.other)
    after = velocity(second, second.cond) - velocity(second, estimated.others[:, 0])
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(estimated.memory, evaluated.memory)


def test_an_estimate_at_the_same_point_is_exact() -> None:
    rows = draw(2)
    none = torch.zeros(2, 1, *rows.cond.shape[1:], dtype=torch.float64)
    kept = Reuse.fill(rows, none, {}, YES).memory
    blind = replace(rows, others=torch.full_like(rows.others, torch.nan))
    torch.testing.assert_close(Reuse.fill(blind, kept, {}, NO).others, rows.others)


def test_it_is_finite_at_pure_noise() -> None:
    rows = draw(2)
    rows = replace(rows, alpha=torch.zeros_like(rows.alpha), sigma=torch.ones_like(rows.sigma))
    none = torch.zeros(2, 1, *rows.cond.shape[1:], dtype=torch.float64)
    filled = Reuse.fill(rows, none, {}, YES)
    assert filled.memory.isfinite().all()
    torch.testing.assert_close(Reuse.fill(rows, filled.memory, {}, NO).others, rows.others)

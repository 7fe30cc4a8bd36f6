"""Magnitude-aware guidance compared with diffusers on velocities."""

from dataclasses import replace

import pytest
import torch
from diffusers.guiders.magnitude_aware_guidance import mambo_guidance
from torch import Tensor

from guidance.cfg import CFG
from guidance.magnitude_aware import MagnitudeAware
from tests.guidance.cases import apply, draw, with_other


def theirs(cond: Tensor, other: Tensor, scale: float, alpha: float) -> Tensor:
    """diffusers' result on flattened input, as its norm over all axes fails on pictures."""
    return mambo_guidance(cond.flatten(1), other.flatten(1), scale, alpha).view_as(cond)


@pytest.mark.parametrize("scale", [0.0, 4.0, 10.0])
def test_on_flow_matching_it_is_diffusers(scale: float) -> None:
    rows = draw(4)
    rows = replace(rows, alpha=1 - rows.sigma)
    cond, other = ((rows.x - D) / rows.sigma for D in (rows.cond, rows.other))
    expected = rows.x - rows.sigma * theirs(cond, other, scale, 8.0)
    torch.testing.assert_close(apply(MagnitudeAware(scale=scale), rows).denoised, expected)


def test_on_variance_preserving_levels_it_is_diffusers_in_v() -> None:
    rows = draw(4)
    cond, other = ((rows.alpha * rows.x - D) / rows.sigma for D in (rows.cond, rows.other))
    expected = rows.alpha * rows.x - rows.sigma * theirs(cond, other, 10.0, 3.0)
    torch.testing.assert_close(apply(MagnitudeAware(damping=3), rows).denoised, expected)


def test_undamped_it_is_cfg() -> None:
    rows = draw(3)
    plain = apply(MagnitudeAware(scale=6, damping=0), rows).denoised
    torch.testing.assert_close(plain, apply(CFG(scale=6), rows).denoised)


def test_the_more_predictions_differ_the_weaker_it_is() -> None:
    rows = draw(1)
    strengths = []
    for distance in (0.01, 0.1, 0.5):
        near = with_other(rows, rows.cond + distance * (rows.other - rows.cond))
        push = apply(MagnitudeAware(), near).denoised - rows.cond
        strengths.append(float(push.norm() / (rows.cond - near.other).norm()))
    assert 9 > strengths[0] > strengths[1] > strengths[2] > 0


def test_a_velocity_of_zeros_holds_nothing_back() -> None:
    rows = draw(2)
    still = torch.zeros_like(rows.x)
    rows = with_other(replace(rows, x=still), still)
    torch.testing.assert_close(
        apply(MagnitudeAware(scale=3), rows).denoised, apply(CFG(scale=3), rows).denoised
    )

"""CFG-Zero* compared with the paper on flow matching, and its equivalent on other models."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import (
    ClassifierFreeZeroStarGuidance,
    cfg_zero_star_scale,
)
from torch import Tensor

from guidance import Rows
from guidance.cfg import CFG
from guidance.cfg_zero_star import CFGZeroStar
from guidance.velocity import velocity, velocity_share
from samplers import NoiseSchedule, integrate
from samplers.ddim import DDIM
from samplers.euler import Euler
from samplers.timesteps import Trailing
from tests.guidance.cases import apply, draw


def on_flow(rows: Rows) -> Rows:
    return replace(rows, alpha=1 - rows.sigma)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_on_flow_matching_it_is_the_papers_formula(scale: float) -> None:
    rows = on_flow(draw(4))
    v_c, v_u = ((rows.x - D) / rows.sigma for D in (rows.cond, rows.other))
    best = inner(v_c, v_u) / inner(v_u, v_u)
    v = best * v_u + scale * (v_c - best * v_u)
    result = apply(CFGZeroStar(scale=scale), rows)
    torch.testing.assert_close(result.denoised, rows.x - rows.sigma * v)


def test_on_flow_matching_it_is_diffusers() -> None:
    rows = on_flow(draw(4))
    v_c, v_u = ((rows.x - D) / rows.sigma for D in (rows.cond, rows.other))
    guider: Any = ClassifierFreeZeroStarGuidance(guidance_scale=6.0, zero_init_steps=1)
    for step, progress in enumerate([0.0, 0.04, 0.5]):
        guider.set_state(step=step, num_inference_steps=25, timestep=torch.tensor(0))
        theirs = rows.x - rows.sigma * guider.forward(v_c, v_u).pred
        here = replace(rows, progress=torch.full_like(rows.progress, progress))
        ours = apply(CFGZeroStar(scale=6), here).denoised
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert cfg_zero_star_scale(v_c.flatten(1), v_u.flatten(1)).shape == (4, 1)


def test_on_variance_preserving_levels_it_is_the_formula_in_v() -> None:
    rows = draw(4)
    v_c, v_u = (
        rows.alpha * (rows.x - rows.alpha * D) / rows.sigma - rows.sigma * D
        for D in (rows.cond, rows.other)
    )
    best = inner(v_c, v_u) / inner(v_u, v_u)
    v = best * v_u + 5 * (v_c - best * v_u)
    expected = rows.alpha * rows.x - rows.sigma * v
    torch.testing.assert_close(apply(CFGZeroStar(scale=5), rows).denoised, expected)


def test_the_fitted_scale_leaves_the_least_distance() -> None:
    rows = draw(1)
    v_c, v_u = velocity(rows, rows.cond), velocity(rows, rows.other)
    best = inner(v_c, v_u) / inner(v_u, v_u)
    least = (v_c - best * v_u).norm()
    assert all((v_c - best * f * v_u).norm() > least for f in (0.9, 1.1))


def test_unfitted_and_without_a_pause_it_is_cfg() -> None:
    rows = draw(3)
    plain = apply(CFGZeroStar(scale=7, fitted=0, zero_init=0), rows).denoised
    torch.testing.assert_close(plain, apply(CFG(scale=7), rows).denoised)


SCHEDULES = {
    "vp": NoiseSchedule.from_diffusers({}),
    "flow": NoiseSchedule.flow(),
    "edm": NoiseSchedule.edm(),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_share_of_x_is_the_slope_of_the_path(schedule: NoiseSchedule) -> None:
    """c = 1 / (alpha - sigma d alpha / d sigma), by finite differences along each schedule."""
    t = np.linspace(schedule.t_end, schedule.t_start, 9)[1:-1]
    step = 1e-4 * schedule.t_start
    (a0, s0), (a, s), (a1, s1) = (schedule.level(t + d) for d in (-step, 0, step))
    slope = (a1 - a0) / (s1 - s0)
    share = velocity_share(torch.from_numpy(a), torch.from_numpy(s))
    np.testing.assert_allclose(share.numpy(), 1 / (a - s * slope), rtol=2e-3)


def test_pure_noise_is_taken_for_flow_matching() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert velocity_share(zero, one).item() == 1


@pytest.mark.parametrize(("steps", "still"), [(5, 1), (25, 1), (28, 2), (50, 2), (100, 4)])
def test_the_first_four_percent_of_the_steps_have_no_velocity(steps: int, still: int) -> None:
    rows = on_flow(draw(1))
    moves = []
    for done in range(steps):
        here = replace(rows, progress=torch.full_like(rows.progress, done / steps))
        moves.append(not torch.equal(apply(CFGZeroStar(), here).denoised, here.x))
    assert moves == [False] * still + [True] * (steps - still)


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_no_velocity_leaves_x_where_it_is(kind: str) -> None:
    """On flow matching exactly; on a circle a straight step falls short by its cosine."""
    schedule = SCHEDULES[kind]
    grid = schedule.grid(Trailing(), 50)
    plan = Euler().plan(grid) if kind == "flow" else DDIM().plan(grid)
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64) * plan.start_scale
    seen: list[Tensor] = []

    def denoise(at: Tensor, t: float) -> Tensor:
        seen.append(at.clone())
        i = len(seen) - 1
        scalar = at.new_ones(1, 1, 1, 1)
        rows = replace(
            draw(1),
            x=at,
            alpha=plan.alpha[i] * scalar,
            sigma=plan.sigma[i] * scalar,
            progress=0 * scalar,
        )
        return apply(CFGZeroStar(), rows).denoised

    integrate(plan, denoise, x)
    factor = 1.0
    if kind == "vp":
        first, second = (np.arctan2(plan.sigma[i], plan.alpha[i]) for i in (0, 1))
        factor = float(np.cos(first - second))
        assert 0.995 < factor < 1
    torch.testing.assert_close(seen[1], factor * x, rtol=1e-9, atol=1e-9)


def test_scale_one_is_the_prompt_from_the_first_step_on() -> None:
    rows = replace(draw(2), progress=torch.zeros(2, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(apply(CFGZeroStar(scale=1), rows).denoised, rows.cond)


def test_a_velocity_of_zeros_needs_no_fit() -> None:
    rows = on_flow(draw(2))
    rows = replace(rows, others=rows.x[:, None])
    torch.testing.assert_close(
        apply(CFGZeroStar(scale=3), rows).denoised, apply(CFG(scale=3), rows).denoised
    )

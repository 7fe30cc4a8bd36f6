"""EDM's churn compared with k-diffusion's samplers, written out in float64."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, Plan, integrate
from samplers.churn import ChurnedSampler
from samplers.dpm_2 import DPM2
from samplers.euler import Euler
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heun import Heun
from samplers.timesteps import Karras, LogSNR, Trailing
from tests.samplers.cases import EDM, FLOW, SCHEDULES, VP

STEPS = 8
DATA = GaussianMixtureDenoiser(EDM)
START = 20 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
NOISE = torch.randn(
    STEPS, *START.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
)


def slope(x: Tensor, sigma: float) -> Tensor:
    return (x - DATA(x, sigma)) / sigma


def euler(x: Tensor, sigma: float, to: float) -> Tensor:
    return x + (to - sigma) * slope(x, sigma)


def heun(x: Tensor, sigma: float, to: float) -> Tensor:
    first = slope(x, sigma)
    x_2 = x + (to - sigma) * first
    return x_2 if to == 0 else x + (to - sigma) * (first + slope(x_2, to)) / 2


def dpm_2(x: Tensor, sigma: float, to: float) -> Tensor:
    if to == 0:
        return euler(x, sigma, to)
    middle = (sigma * to) ** 0.5
    return x + (to - sigma) * slope(euler(x, sigma, middle), middle)


@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 2.0},
        {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.007},
    ],
    ids=["everywhere", "at most, in a window"],
)
@pytest.mark.parametrize(
    ("sampler", "step"),
    [(Euler, euler), (Heun, heun), (DPM2, dpm_2)],
    ids=["euler", "heun", "dpm_2"],
)
def test_a_run_is_that_of_k_diffusion(
    sampler: type[ChurnedSampler], step: Callable[..., Tensor], churn: dict[str, Any]
) -> None:
    """sample_euler, sample_heun and sample_dpm_2; the first noise is part of our start noise."""
    grid = EDM.grid(Karras(), STEPS + 2).tail(0.8)
    plan = sampler(**churn).plan(grid)
    gamma = min(churn["s_churn"] / STEPS, 2**0.5 - 1)
    lowest, highest = churn.get("s_tmin", 0), churn.get("s_tmax", np.inf)
    x, started = START, None
    for i, (sigma, to) in enumerate(pairwise(grid.sigma.tolist())):
        raised = sigma * (1 + gamma) if lowest <= sigma <= highest else sigma
        x = x + churn.get("s_noise", 1) * NOISE[i] * (raised**2 - sigma**2) ** 0.5
        started = x if started is None else started
        x = step(x, raised, to)
    assert started is not None
    ours = integrate(plan, DATA, started, lambda stage: NOISE[plan.step[stage] + 1])
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-13)
    assert plan.steps == STEPS


@pytest.mark.parametrize("name", ["scaled_linear", "zero_snr", "flow", "edm", "trigflow"])
def test_noise_is_raised_by_its_share_and_never_above_the_model(name: str) -> None:
    schedule: NoiseSchedule = SCHEDULES[name]
    grid = schedule.grid(LogSNR() if name == "scaled_linear" else Trailing(), 6)
    plan = Euler(s_churn=1.2).plan(grid)
    with np.errstate(divide="ignore"):
        alpha, sigma = schedule.level(np.array(schedule.t_start))
        top, ratio = sigma / alpha, grid.sigma[:-1] / grid.alpha[:-1]
    np.testing.assert_allclose(plan.noise_ratio[1:], np.minimum(1.2 * ratio, top)[1:], rtol=1e-9)
    assert (plan.t[0], plan.alpha[0], plan.sigma[0]) == (grid.t[0], grid.alpha[0], grid.sigma[0])
    np.testing.assert_allclose(schedule.level(plan.t[:-1]), (plan.alpha[:-1], plan.sigma[:-1]))


def share_of_the_variance(plan: Plan, start: float) -> float:
    """Ratio of the variance to the correct one after a run on N(0, 0.36), given it at the start."""
    K, total = plan.slots, 0.36 * plan.alpha**2 + plan.sigma**2
    covariance = np.zeros((K, K))
    covariance[0, 0] = start * total[0]
    for table, alpha, variance in zip(plan.tables, plan.alpha, total, strict=False):
        # The exact denoised prediction is a multiple of x, so each stage is one matrix.
        move = table[:, :K].copy()
        move[:, 0] += table[:, K] * alpha * 0.36 / variance
        covariance = move @ covariance @ move.T + np.outer(table[:, K + 1], table[:, K + 1])
    return float(covariance[0, 0] / total[-1])


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_churn_brings_data_to_their_variance_that_the_flow_keeps_away(
    schedule: NoiseSchedule,
) -> None:
    grid = schedule.grid(LogSNR(), 100, t_end=0.02)
    none, some, much = (
        share_of_the_variance(Heun(s_churn=s_churn).plan(grid), 0.25)
        for s_churn in (0.0, 1.0, 20.0)
    )
    assert none == pytest.approx(0.25, rel=0.01)
    assert 0.4 < some < 0.99
    assert much == pytest.approx(1, abs=0.01)


def test_a_run_that_begins_below_the_top_begins_raised() -> None:
    """It has the same distribution as noise added to the start."""
    grid = EDM.grid(Karras(), 10).tail(0.5)
    plan = Heun(s_churn=1.0).plan(grid)
    assert plan.sigma[0] == pytest.approx(1.2 * grid.sigma[0])
    assert plan.start_scale == plan.sigma[0]


def test_the_bounds_of_the_window_belong_to_it() -> None:
    grid = EDM.grid(Karras(), 6)
    sigma = float(grid.sigma[3])
    plan = Euler(s_churn=0.6, s_tmin=sigma, s_tmax=sigma).plan(grid)
    np.testing.assert_allclose(plan.sigma / grid.sigma.clip(1e-9), [1, 1, 1, 1.1, 1, 1, 0])


def test_without_churn_it_is_the_plain_solver() -> None:
    grid = FLOW.grid(Trailing(), 5)
    for kind in (Euler, Heun, DPM2):
        plain = kind().plan(grid)
        for unchurned in (kind(s_noise=1.5), kind(s_churn=5.0, s_tmax=1e-3)):
            assert np.array_equal(unchurned.plan(grid).tables, plain.tables)
            assert np.array_equal(unchurned.plan(grid).t, plain.t)

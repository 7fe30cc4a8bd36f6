"""Restart sampling."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, integrate
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from samplers.heun import Heun
from samplers.restart import Restart
from samplers.timesteps import Karras, LogSNR, Trailing
from tests.samplers.cases import DISCRETE, EDM, FLOW, VP

START = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[None]


def test_a_run_is_algorithm_one_of_the_paper() -> None:
    """Heun in sigma, written out, with the levels of a descent even in sigma^(1/7)."""
    steps, restarts, low, high = 8, 2, 0.3, 1.5
    data = GaussianMixtureDenoiser(EDM)
    sigmas = EDM.grid(Karras(), steps).sigma
    turn = int(np.argmin(np.abs(sigmas[1:-1] - low))) + 1
    bottom = sigmas[turn]
    descent = np.linspace(high ** (1 / 7), bottom ** (1 / 7), 5) ** 7
    noise = torch.randn(
        40, *START.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    stage = 0

    def heun(x: Tensor, levels: np.ndarray) -> Tensor:
        nonlocal stage
        for sigma, to in pairwise(levels):
            d = (x - data(x, sigma)) / sigma
            euler = x + (to - sigma) * d
            stage += 1
            if to == 0:
                return euler
            x = x + (to - sigma) * 0.5 * (d + (euler - data(euler, to)) / to)
            stage += 1
        return x

    x = heun(80 * START, sigmas[: turn + 1])
    for _ in range(restarts):
        x = x + (high**2 - bottom**2) ** 0.5 * noise[stage - 1]
        x = heun(x, descent)
    x = heun(x, sigmas[turn:])
    sampler = Restart(low=low, high=high, restarts=restarts, share=0.5)
    plan = sampler.plan(EDM.grid(Karras(), steps))
    assert plan.evaluations == stage == sampler.evaluations(steps)
    ours = integrate(plan, data, 80 * START, noise.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", ["heun", "euler", "dpm_solver_pp"])
def test_levels_rise_as_often_as_asked_and_steps_are_counted(base: str) -> None:
    sampler = Restart.model_validate({"base": base, "restarts": 3})
    plan = sampler.plan(VP.grid(LogSNR(), 20))
    ratio = plan.sigma / plan.alpha
    risen = np.flatnonzero(np.diff(ratio) > 0)
    assert len(risen) == 3
    np.testing.assert_allclose(ratio[risen + 1], 2.0)
    assert np.flatnonzero(plan.noisy).tolist() == risen.tolist()
    assert plan.steps == sampler.steps_taken(20) == 20 + 3 * 5
    assert np.diff(plan.step).max() == 1


def test_it_turns_at_the_sigma_nearest_to_low_as_the_authors_do() -> None:
    """Of the levels .117 and .020, the second is nearer to .05, and the first in log sigma."""
    grid = EDM.grid(Karras(), 10)
    plan = Restart(base="euler", low=0.05, restarts=1).plan(grid)
    (risen,) = np.flatnonzero(np.diff(plan.sigma) > 0)
    assert plan.sigma[risen] == pytest.approx(0.117, abs=1e-3)
    descent = Restart(base="euler", low=0.05).steps_taken(10) - 10
    assert plan.sigma[risen + 1 + descent] == pytest.approx(0.020, abs=1e-3)


def test_a_single_step_leaves_nothing_to_restart() -> None:
    grid = DISCRETE.grid(Trailing(), 1)
    np.testing.assert_array_equal(Restart().plan(grid).tables, Heun().plan(grid).tables)


@pytest.mark.parametrize("high", [0.5, 10.0])
def test_the_way_up_is_to_a_point_above_and_within_the_run(high: float) -> None:
    """The first inner point lies above .5, and the run starts below 10."""
    grid = EDM.grid(LogSNR(), 2, t_start=4.0, t_end=0.2)
    assert grid.sigma[1] > 0.5
    plan = Restart(base="euler", low=0.5, high=high).plan(grid)
    assert plan.noisy == (True, False, False)
    np.testing.assert_allclose(plan.sigma, [4.0, 4.0, *grid.sigma[1:]])


def test_a_run_that_starts_at_pure_noise_turns_at_its_second_point_at_worst() -> None:
    plan = Restart(low=0.01).plan(FLOW.grid(Trailing(), 2))
    assert plan.alpha[0] == 0
    assert np.isfinite(plan.tables).all()
    assert (plan.alpha[1:] > 0).all()


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_restarts_contract_an_error_made_before(schedule: NoiseSchedule) -> None:
    """An error at the start shrinks by the fraction of the data in the noised state."""
    data = GaussianDenoiser(schedule, 0.7, 0.6)
    grid = schedule.grid(LogSNR(), 40)
    start = grid.alpha[0] * 0.7 + torch.tensor([[0.0, 0.1]], dtype=torch.float64) * grid.sigma[0]
    left: list[float] = []
    for restarts in (1, 2, 3):
        plan = Restart(restarts=restarts, high=5.0).plan(grid)
        landed = integrate(plan, data, start, lambda _: torch.zeros(1, 2, dtype=torch.float64))
        left.append(float(landed[0, 1] - landed[0, 0]))
    # In x / alpha, going up keeps the error; coming down shrinks it with the standard deviation.
    inner = (grid.sigma / grid.alpha)[1:-1]
    bottom = float(inner[np.argmin(np.abs(inner - 0.1))])
    share = (np.hypot(0.6, bottom) / np.hypot(0.6, 5.0)).item()
    assert left[1] / left[0] == pytest.approx(share, rel=0.05)
    assert left[2] / left[1] == pytest.approx(share, rel=0.05)

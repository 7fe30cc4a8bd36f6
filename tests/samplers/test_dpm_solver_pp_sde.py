"""DPM++ SDE compared with k-diffusion's sampler, written out."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, integrate
from samplers.dpm_solver_pp_sde import DPMSolverPPSDE
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import Karras, LogSNR
from tests.samplers.cases import EDM, FLOW, VP

NOISE = torch.randn(13, 1, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def down_and_up(sigma: float, to: float, eta: float) -> tuple[float, float]:
    up = min(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
    return (to**2 - up**2) ** 0.5, up


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_it_is_that_of_k_diffusion(eta: float) -> None:
    """sample_dpmpp_sde, r = 1/2; its Brownian path over sigma has two increments a step."""
    data = GaussianMixtureDenoiser(EDM)
    grid = EDM.grid(Karras(), 6)
    start = x = 80 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
    for i, (sigma, to) in enumerate(zip(grid.sigma[:-1], grid.sigma[1:], strict=True)):
        D = data(x, sigma)
        if to == 0:
            x = D
            break
        middle = (sigma * to) ** 0.5
        first = (sigma - middle) ** 0.5 * NOISE[2 * i]
        both = first + (middle - to) ** 0.5 * NOISE[2 * i + 1]
        down, up = down_and_up(sigma, middle, eta)
        half = down / sigma * x + (1 - down / sigma) * D + up * first / (sigma - middle) ** 0.5
        down, up = down_and_up(sigma, to, eta)
        inner = data(half, middle)
        x = down / sigma * x + (1 - down / sigma) * inner + up * both / (sigma - to) ** 0.5
    plan = DPMSolverPPSDE(eta=eta).plan(grid)
    ours = integrate(plan, data, start, NOISE.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_without_noise_it_is_2s(schedule: NoiseSchedule) -> None:
    data = GaussianMixtureDenoiser(schedule)
    grid = schedule.grid(LogSNR(), 6)
    start = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    ours, same = (
        integrate(one.plan(grid), data, start)
        for one in (DPMSolverPPSDE(eta=0.0), DPMSolverPPSinglestep())
    )
    torch.testing.assert_close(ours, same, rtol=1e-10, atol=1e-10)


def test_from_pure_noise_both_halves_draw_one_noise() -> None:
    """In sigma / alpha, the first half is the whole path."""
    plan = DPMSolverPPSDE().plan(FLOW.grid("trailing", 4))
    assert np.isfinite(plan.tables).all()
    assert plan.tables[1, 0, 2] > 0
    assert plan.tables[1, 0, 4] == 0

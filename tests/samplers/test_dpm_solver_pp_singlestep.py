"""Singlestep DPM-Solver++, beyond the contract of all samplers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, integrate
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.testing import check_plan
from samplers.timesteps import Karras, LogSNR, Trailing
from tests.samplers.cases import EDM, FLOW, VP

START = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[None]
Denoise = Callable[[Tensor, float], Tensor]


def singlestep(**fields: object) -> DPMSolverPPSinglestep:
    return DPMSolverPPSinglestep.model_validate(fields)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_order_two_is_the_ancestral_2s_that_users_know(eta: float) -> None:
    """As in k-diffusion, in sigma and its logarithm, with the model at alpha 1."""
    steps = 6
    fresh = torch.randn(
        2 * steps, *START.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    grid = EDM.grid(Karras(), steps)
    data = GaussianMixtureDenoiser(EDM)
    x = 80 * START
    for i, (sigma, to) in enumerate(zip(grid.sigma[:-1], grid.sigma[1:], strict=True)):
        D = data(x, sigma)
        if to == 0:
            x = D
            break
        up = min(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
        down = (to**2 - up**2) ** 0.5
        t, t_next = -np.log(sigma), -np.log(down)
        h = t_next - t
        s = t + h / 2
        inner = np.exp(-s) / sigma * x - np.expm1(-h / 2) * D
        x = down / sigma * x - np.expm1(-h) * data(inner, np.exp(-s))
        x = x + up * fresh[2 * i + 1]
    plan = singlestep(eta=eta).plan(grid)
    ours = integrate(plan, data, 80 * START, fresh.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def third_order(solver_type: str, denoise: Denoise, schedule: NoiseSchedule) -> Tensor:
    """The authors' third-order singlestep update, from their phi functions."""
    grid = schedule.grid(LogSNR(), 4, t_end=0.05)
    lam = grid.half_log_snr
    x = START
    r1, r2 = 1 / 3, 2 / 3
    for i in range(4):
        h = lam[i + 1] - lam[i]
        times = schedule.time_of_half_log_snr(lam[i] + h * np.array([r1, r2]))
        alphas, sigmas = schedule.level(times)
        phi_11, phi_12, phi_1 = np.expm1(-r1 * h), np.expm1(-r2 * h), np.expm1(-h)
        phi_22, phi_2 = phi_12 / (r2 * h) + 1, phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        m_s = denoise(x, grid.t[i])
        x_1 = sigmas[0] / grid.sigma[i] * x - alphas[0] * phi_11 * m_s
        m_1 = denoise(x_1, times[0])
        x_2 = sigmas[1] / grid.sigma[i] * x - alphas[1] * phi_12 * m_s
        x_2 = x_2 + r2 / r1 * alphas[1] * phi_22 * (m_1 - m_s)
        m_2 = denoise(x_2, times[1])
        x = grid.sigma[i + 1] / grid.sigma[i] * x - grid.alpha[i + 1] * phi_1 * m_s
        D1_0, D1_1 = (m_1 - m_s) / r1, (m_2 - m_s) / r2
        if solver_type == "midpoint":
            x = x + grid.alpha[i + 1] * phi_2 * D1_1
        else:
            D1 = (r2 * D1_0 - r1 * D1_1) / (r2 - r1)
            D2 = 2 * (D1_1 - D1_0) / (r2 - r1)
            x = x + grid.alpha[i + 1] * (phi_2 * D1 - phi_3 * D2)
    return x


@pytest.mark.parametrize("solver_type", ["midpoint", "taylor"])
@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_order_three_is_the_authors_update(schedule: NoiseSchedule, solver_type: str) -> None:
    data = GaussianMixtureDenoiser(schedule)
    plan = singlestep(order=3, solver_type=solver_type).plan(schedule.grid(LogSNR(), 4, t_end=0.05))
    expected = third_order(solver_type, data, schedule)
    torch.testing.assert_close(integrate(plan, data, START), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
def test_inner_points_are_even_in_log_snr_also_at_pure_noise(order: int) -> None:
    plan = singlestep(order=order).plan(FLOW.grid(Trailing(), 3))
    lam = np.log(plan.alpha[1:-1]) - np.log(plan.sigma[1:-1])
    for step in (lam[:order], lam[order - 1 : 2 * order]):
        np.testing.assert_allclose(np.diff(step, 2), 0, atol=1e-12)
    assert plan.alpha[0] == 0


@pytest.mark.parametrize("order", [2, 3])
def test_a_point_moved_within_a_step_stays_moved(order: int) -> None:
    plan = singlestep(order=order).plan(VP.grid(LogSNR(), 3, t_end=0.1))
    for stage in range(plan.evaluations):
        move = np.eye(plan.slots)[0]
        for table in plan.tables[stage:]:
            move = table[:, : plan.slots] @ move
        assert move[0] == pytest.approx(plan.sigma[-1] / plan.sigma[stage])


@pytest.mark.parametrize("order", [2, 3])
def test_an_ancestral_step_from_all_but_pure_noise_has_numbers(order: int) -> None:
    """The spacing starts at alpha 0 up to rounding, and the step renews all noise."""
    grid = FLOW.grid("kl_optimal", 3)
    assert 0 < grid.alpha[0] < 1e-15
    check_plan(singlestep(order=order, eta=1.0).plan(grid), f"order {order}")

"""DPM-Solver++, beyond the contract of all samplers."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, integrate
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import LogSNR
from tests.samplers.cases import EDM, FLOW, VP
from tests.samplers.test_contract import DEVIATION, moments


def test_equation_of_the_multistep_second_order_update() -> None:
    """Algorithm 2 of the paper, written out for one step."""
    grid = VP.grid(LogSNR(), 20)
    i = 7
    lam = grid.half_log_snr
    h, h_last = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
    r = h_last / h
    D = {"D": 1 + 1 / (2 * r), "D1": -1 / (2 * r)}
    gain = -grid.alpha[i + 1] * np.expm1(-h)
    row = DPMSolverPP().plan(grid).tables[i, 0]
    np.testing.assert_allclose(
        row,
        [grid.sigma[i + 1] / grid.sigma[i], gain * D["D1"], 0, gain * D["D"], 0, 0],
        rtol=1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("solver_type", ["midpoint", "taylor"])
def test_prediction_linear_in_log_snr_is_followed_exactly_by_taylor_alone(
    solver_type: str,
) -> None:
    """The exact answer is the integral of e^(lam - lam') D(lam), D = a + b lam."""
    a, b = 0.4, -0.3
    grid = VP.grid(LogSNR(), 12, t_start=1.0, t_end=0.05)
    lam, i = grid.half_log_snr, 6
    plan = DPMSolverPP.model_validate(
        {"solver_type": solver_type, "lower_order_final": False}
    ).plan(grid)
    state = np.array([0.9, a + b * lam[i - 1], 0, a + b * lam[i], 0, 0])
    h = lam[i + 1] - lam[i]
    gain = -np.expm1(-h)
    exact = grid.sigma[i + 1] / grid.sigma[i] * 0.9 + grid.alpha[i + 1] * (
        (a + b * lam[i]) * gain + b * (h - gain)
    )
    error = abs(plan.tables[i, 0] @ state - exact)
    assert error < 1e-14 if solver_type == "taylor" else error > 1e-3


@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=["flow", "edm"])
@pytest.mark.parametrize(("order", "weak_order"), [(1, 1), (2, 2), (3, 2)])
def test_sde_has_its_weak_order_on_gaussian_data(
    schedule: NoiseSchedule, order: int, weak_order: int
) -> None:
    sampler = DPMSolverPP.model_validate({"order": order, "variant": "sde"})
    steps = (100, 200, 400)
    found = [
        abs(moments(sampler.plan(schedule.grid(LogSNR(), n)), DEVIATION)[1][-1] - DEVIATION**2)
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(found), 1)[0]
    assert abs(slope - weak_order) < 0.25, found


def test_third_order_is_worth_its_history_though_its_power_is_the_second() -> None:
    """The published weight of the second difference is half of Taylor's; see the docstring."""
    data = GaussianMixtureDenoiser(VP)
    x = torch.linspace(-1.6, 1.6, 17, dtype=torch.float64)[None]
    exact = data.transport(x, 1.0, 0.02)
    grid = VP.grid(LogSNR(), 40, 1.0, 0.02)
    second, third = (
        float((integrate(DPMSolverPP(order=order).plan(grid), data, x) - exact).abs().max())
        for order in (2, 3)
    )
    assert 0.2 < third / second < 0.4

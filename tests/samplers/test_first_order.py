"""DDIM, Euler and their ancestral forms are one family under several names."""

import numpy as np

from samplers import NoiseSchedule
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.euler import Euler, EulerAncestral
from samplers.timesteps import Trailing
from tests.samplers.cases import DISCRETE, EDM, FLOW, each_schedule


@each_schedule
def test_euler_is_ddim_without_fresh_noise(schedule: NoiseSchedule) -> None:
    grid = schedule.grid(Trailing(), 9)
    np.testing.assert_array_equal(Euler().plan(grid).tables, DDIM(eta=0).plan(grid).tables)


@each_schedule
def test_euler_ancestral_is_ddim_with_the_same_eta(schedule: NoiseSchedule) -> None:
    grid = schedule.grid(Trailing(), 9)
    for eta in (0.0, 0.3, 1.0):
        ancestral = EulerAncestral(eta=eta).plan(grid).tables
        np.testing.assert_array_equal(ancestral, DDIM(eta=eta).plan(grid).tables)


@each_schedule
def test_dpm_solver_pp_of_order_one_is_ddim(schedule: NoiseSchedule) -> None:
    grid = schedule.grid(Trailing(), 9)
    ddim, solver = DDIM().plan(grid).tables, DPMSolverPP(order=1).plan(grid).tables
    np.testing.assert_array_equal(solver[:, 0, [0, 3, 4, 5]], ddim[:, 0])


@each_schedule
def test_sde_dpm_solver_pp_of_order_one_is_ancestral_ddim(schedule: NoiseSchedule) -> None:
    """The stochastic exponential step equals sampling the posterior of the forward noise."""
    grid = schedule.grid(Trailing(), 9)
    ddim = DDIM(eta=1).plan(grid).tables
    solver = DPMSolverPP(order=1, variant="sde").plan(grid).tables
    np.testing.assert_allclose(solver[:, 0, [0, 3, 4, 5]], ddim[:, 0], rtol=1e-9, atol=1e-12)


def test_variance_preserving_noise_is_equation_16_of_ddim() -> None:
    grid = DISCRETE.grid(Trailing(), 10)
    tables = DDIM(eta=0.7).plan(grid).tables
    bar = grid.alpha**2
    posterior = (1 - bar[1:]) / (1 - bar[:-1]) * (1 - bar[:-1] / bar[1:])
    np.testing.assert_allclose(tables[:, 0, 2], 0.7 * np.sqrt(posterior), rtol=1e-10, atol=1e-15)


def test_variance_exploding_noise_is_sigma_up_of_k_diffusion() -> None:
    grid = EDM.grid(Trailing(), 10)
    tables = EulerAncestral().plan(grid).tables
    start, end = grid.sigma[:-1], grid.sigma[1:]
    up = np.sqrt(end**2 * (start**2 - end**2) / start**2)
    down = np.sqrt(end**2 - up**2)
    np.testing.assert_allclose(tables[:, 0, 2], up, rtol=1e-12)
    np.testing.assert_allclose(tables[:, 0, 0], down / start, rtol=1e-12)


def test_euler_on_flow_matching_moves_along_the_velocity() -> None:
    grid = FLOW.grid(Trailing(), 10)
    tables = Euler().plan(grid).tables
    step = grid.sigma[1:] - grid.sigma[:-1]
    # x' = x + (t' - t) v, with v = (x - D) / t.
    np.testing.assert_allclose(tables[:, 0, 0], 1 + step / grid.sigma[:-1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(tables[:, 0, 1], -step / grid.sigma[:-1], rtol=1e-12, atol=1e-15)

"""UniPC, beyond the contract of all samplers."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, integrate
from samplers.ddim import DDIM
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.grid import Grid
from samplers.timesteps import LogSNR, Trailing
from samplers.unipc import UniPC, _weights
from tests.samplers.cases import FLOW, VP


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_weights_solve_the_order_conditions(variant: str) -> None:
    """Sum of weights times nodes^(k - 1), times B, is z k! phi_(k + 1)(z) (equation 11)."""
    z = -0.37
    B = z if variant == "bh1" else np.expm1(z)
    nodes = np.array([-0.9, -2.1, 1.0])
    phi2 = (np.expm1(z) - z) / z**2
    phi3 = (phi2 - 1 / 2) / z
    phi4 = (phi3 - 1 / 6) / z
    for k, phi in enumerate((phi2, phi3, phi4), start=1):
        left = B * np.sum(_weights(nodes, z, B) * nodes ** (k - 1))
        factorial = {1: 1, 2: 2, 3: 6}[k]
        np.testing.assert_allclose(left, z * factorial * phi, rtol=1e-9)


def test_predictor_is_ddim_at_order_one() -> None:
    grid = VP.grid(LogSNR(), 5)
    first = UniPC(order=1).plan(grid).tables[0, 0]
    np.testing.assert_array_equal(first[[0, 4, 5, 6]], DDIM().plan(grid).tables[0, 0])


def test_corrector_is_algorithm_5_from_the_point_before() -> None:
    """UniC repeats the step from the corrected point with the prediction at the point reached."""
    grid = VP.grid(LogSNR(), 3, t_end=0.05)
    data = GaussianMixtureDenoiser(VP)
    x0 = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
    lam, alpha, sigma = grid.half_log_snr, grid.alpha, grid.sigma
    h = np.diff(lam)

    def exponential_step(x: torch.Tensor, D: torch.Tensor, i: int) -> torch.Tensor:
        return sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h[i]) * D

    D0 = data(x0, grid.t[0])
    D1 = data(exponential_step(x0, D0, 0), grid.t[1])
    x1 = exponential_step(x0, D0, 0) - alpha[1] * np.expm1(-h[0]) * 0.5 * (D1 - D0)
    r = (lam[0] - lam[1]) / h[1]
    gain = -alpha[2] * np.expm1(-h[1])
    D2 = data(exponential_step(x1, D1, 1) + gain * 0.5 * (D0 - D1) / r, grid.t[2])
    w = _weights(np.array([r, 1.0]), -h[1], np.expm1(-h[1]))
    x2 = exponential_step(x1, D1, 1) + gain * (w[0] * (D0 - D1) / r + w[1] * (D2 - D1))
    r = (lam[1] - lam[2]) / h[2]
    x3 = exponential_step(x2, D2, 2)
    x3 = x3 - alpha[3] * np.expm1(-h[2]) * 0.5 * (D1 - D2) / r
    plan = UniPC(lower_order_final=False).plan(grid)
    torch.testing.assert_close(integrate(plan, data, x0), x3, rtol=1e-12, atol=1e-12)


def test_levels_below_the_stand_in_for_pure_noise_keep_their_distance() -> None:
    """Shifted flow schedules start with several points below a half-log-SNR of -7."""
    schedule = NoiseSchedule.flow(shift=40.0)
    grid = schedule.grid(Trailing(), 100)
    assert (grid.half_log_snr[:4] < -7).all()
    assert np.isfinite(UniPC(order=3).plan(grid).tables).all()


def test_a_start_at_pure_noise_is_as_good_as_one_just_below() -> None:
    data = GaussianMixtureDenoiser(FLOW)
    x = torch.linspace(-1.6, 1.6, 17, dtype=torch.float64)[None]
    times = np.linspace(1, 0, 21)[:-1]
    nearly = np.append(1 - 1e-6, times[1:])
    pure, near = (
        integrate(UniPC().plan(Grid.on_times(FLOW, t, clean=True)), data, x)
        for t in (times, nearly)
    )
    torch.testing.assert_close(pure, near, rtol=0, atol=1e-3)

"""Gradient estimation compared with ComfyUI's sampler, written out."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, Spacing, integrate
from samplers.euler import Euler
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.gradient_estimation import GradientEstimation
from samplers.timesteps import Karras, Trailing
from tests.samplers.cases import EDM, FLOW


@pytest.mark.parametrize("gamma", [1.5, 2.0])
@pytest.mark.parametrize(("schedule", "spacing"), [(EDM, Karras()), (FLOW, Trailing())])
def test_it_is_that_of_comfyui(schedule: NoiseSchedule, spacing: Spacing, gamma: float) -> None:
    data = GaussianMixtureDenoiser(schedule)
    grid = schedule.grid(spacing, 6)
    start = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None] * float(grid.sigma[0])
    x, before = start, None
    for sigma, to in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        d = (x - data(x, sigma)) / sigma
        lean = 0 if before is None or to == 0 else (gamma - 1) * (d - before)
        x, before = x + (to - sigma) * (d + lean), d
    ours = integrate(GradientEstimation(gamma=gamma).plan(grid), data, start)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def test_at_gamma_one_it_is_euler() -> None:
    grid = FLOW.grid(Trailing(), 5)
    tables = GradientEstimation(gamma=1.0).plan(grid).tables
    np.testing.assert_allclose(tables[:, 0, [0, 2]], Euler().plan(grid).tables[:, 0, :2])
    np.testing.assert_allclose(tables[:, 0, 1], 0, atol=1e-15)

"""Latent consistency sampling."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, integrate
from samplers.gaussian import GaussianDenoiser
from samplers.lcm import LCM
from samplers.timesteps import LCMSpacing, Trailing
from tests.samplers.cases import DISCRETE, EDM, FLOW, VP


def test_an_exact_consistency_function_gives_the_data_in_any_number_of_steps() -> None:
    data = GaussianDenoiser(DISCRETE, 0.7, 0.6)
    generator = torch.Generator().manual_seed(5)

    def noise(stage: int = 0) -> torch.Tensor:
        return torch.randn(1, 40_000, generator=generator, dtype=torch.float64)

    for steps in (1, 4):
        plan = LCM().plan(DISCRETE.grid(LCMSpacing(), steps))
        start = plan.alpha[0] * (0.7 + 0.6 * noise()) + plan.sigma[0] * noise()
        landed = integrate(plan, lambda x, t: data.transport(x, t, 0.0), start, noise)
        # The clean end of the trained steps is at sigma .01; five standard errors.
        assert abs(float(landed.mean()) - 0.7) < 5 * 0.6 / 200
        assert abs(float(landed.std()) - 0.6) < 5 * 0.6 / 200 / 2**0.5 + 1e-4


def test_the_boundary_condition_keeps_x_at_the_clean_end() -> None:
    tables = LCM().plan(DISCRETE.grid(Trailing(), 1000)).tables
    x, D = tables[-1, 0, 0], tables[-1, 0, 1]
    assert (x, D) == (1.0, 0.0)
    tau = 10 * 999.0
    assert tables[0, 0, 0] == pytest.approx(
        DISCRETE.level(np.array(998.0))[0] * 0.25 / (tau**2 + 0.25)
    )


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_models_without_whole_timesteps_are_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="sampler is 'lcm', which needs a model with whole"):
        LCM().plan(schedule.grid(Trailing(), 4))

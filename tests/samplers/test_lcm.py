"""Latent consistency sampling."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, Spacing, integrate
from samplers.angles import Angles
from samplers.gaussian import GaussianDenoiser
from samplers.lcm import LCM
from samplers.timesteps import Karras, LCMSpacing, Trailing
from tests.samplers.cases import DISCRETE, EDM, FLOW, TRIGFLOW, VP


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [
        (DISCRETE, LCMSpacing()),
        (VP, Trailing()),
        (FLOW, Trailing()),
        (EDM, Karras()),
        (TRIGFLOW, Angles()),
    ],
    ids=["discrete", "vp", "flow", "edm", "trigflow"],
)
def test_an_exact_consistency_function_gives_the_data_in_any_number_of_steps(
    schedule: NoiseSchedule, spacing: Spacing
) -> None:
    data = GaussianDenoiser(schedule, 0.7, 0.6)
    generator = torch.Generator().manual_seed(5)

    def noise(stage: int = 0) -> torch.Tensor:
        return torch.randn(1, 40_000, generator=generator, dtype=torch.float64)

    for steps in (1, 4):
        plan = LCM().plan(schedule.grid(spacing, steps))
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

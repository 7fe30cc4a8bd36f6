"""Trajectory consistency sampling."""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, integrate
from samplers.ddim import DDIM
from samplers.gaussian import GaussianDenoiser
from samplers.lcm import LCM
from samplers.tcd import TCD
from samplers.timesteps import Karras, LCMSpacing, Trailing
from tests.covering import spread
from tests.samplers.cases import DISCRETE, EDM, FLOW, TRIGFLOW, VP


def test_without_noise_it_is_ddim() -> None:
    grid = DISCRETE.grid(LCMSpacing(), 4)
    tables = TCD(gamma=0.0).plan(grid).tables
    np.testing.assert_allclose(tables, DDIM().plan(grid).tables, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, 0.75, 1.0])
def test_each_step_jumps_below_the_next_time_and_noises_up_to_it(gamma: float) -> None:
    """Algorithm 4, with the cumulative products of a linear beta schedule written out."""
    bar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    times = [999, 759, 499, 259]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 1, 5, generator=generator, dtype=torch.float64)
    x = start = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    for n, (t, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
        D = torch.tanh(x)
        if after is None:
            x = D
            break
        s = int((1 - gamma) * after)
        eps = (x - bar[t] ** 0.5 * D) / (1 - bar[t]) ** 0.5
        x = bar[s] ** 0.5 * D + (1 - bar[s]) ** 0.5 * eps
        share = bar[after] / bar[s]
        x = share**0.5 * x + (1 - share) ** 0.5 * noise[n]
    plan = TCD(gamma=gamma).plan(DISCRETE.grid(LCMSpacing(), 4))
    assert plan.t[:-1].tolist() == times
    ours = integrate(plan, lambda x, _: torch.tanh(x), start, noise.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_exact_jumps_give_the_data_at_any_gamma() -> None:
    """A trajectory consistency function lands on the flow, which is known here.

    D is replaced by the value with which the step from t to s lands there.
    """
    data = GaussianDenoiser(DISCRETE, 0.7, 0.6)
    generator = torch.Generator().manual_seed(5)

    def noise(stage: int = 0) -> torch.Tensor:
        return torch.randn(1, 40_000, generator=generator, dtype=torch.float64)

    for gamma in (0.3, 1.0):
        plan = TCD(gamma=gamma).plan(DISCRETE.grid(LCMSpacing(), 4))
        following = dict(zip(plan.t[:-1], plan.t[1:], strict=True))

        def jump(
            x: torch.Tensor, t: float, to: dict[float, float] = following, gamma: float = gamma
        ) -> torch.Tensor:
            s = float(np.floor((1 - gamma) * to[t]))
            if to[t] == 0:
                return data.transport(x, t, 0.0)
            (alpha, sigma), (alpha_s, sigma_s) = (
                (float(c) for c in DISCRETE.level(np.array(u))) for u in (t, s)
            )
            ratio = sigma_s / sigma
            return (data.transport(x, t, s) - ratio * x) / (alpha_s - ratio * alpha)

        start = plan.alpha[0] * (0.7 + 0.6 * noise()) + plan.sigma[0] * noise()
        landed = integrate(plan, jump, start, noise)
        # The clean end of the trained steps is at sigma .01; five standard errors.
        assert abs(float(landed.mean()) - 0.7) < 5 * 0.6 / 200
        assert abs(float(landed.std()) - 0.6) < 5 * 0.6 / 200 / 2**0.5 + 1e-4


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_gamma_sampling_of_ctm_shares_out_the_noise_level(gamma: float) -> None:
    """Algorithm 3 of arXiv 2310.02279, whose G(x, t, s) is s / t x + (1 - s / t) D."""
    grid = EDM.grid(Karras(), 4)
    times = grid.t.tolist()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 1, 5, generator=generator, dtype=torch.float64)
    x = start = 80 * torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    for n, (t, after) in enumerate(pairwise(times)):
        s = (1 - gamma**2) ** 0.5 * after
        x = s / t * x + (1 - s / t) * torch.tanh(x) + gamma * after * noise[n]
    plan = TCD(gamma=gamma, measure="noise").plan(grid)
    ours = integrate(plan, lambda x, _: torch.tanh(x), start, noise.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_gamma_shares_out_the_noise_level_on_whole_timesteps_too() -> None:
    grid = DISCRETE.grid(Trailing(), 4)
    plan = TCD(gamma=0.4, measure="noise").plan(grid)
    # Columns: x, the denoised prediction, fresh noise and one.
    fresh = plan.tables[:-1, 0, 2]
    np.testing.assert_allclose(fresh, 0.4 * grid.sigma[1:-1], rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "measure"), spread([VP, FLOW, EDM, TRIGFLOW], ["time", "noise"]), ids=str
)
def test_on_continuous_time_full_noise_is_consistency_sampling(
    schedule: NoiseSchedule, measure: Literal["time", "noise"]
) -> None:
    grid = schedule.grid(Trailing(), 4)
    tables = TCD(gamma=1.0, measure=measure).plan(grid).tables
    np.testing.assert_allclose(tables, LCM().plan(grid).tables, rtol=1e-12, atol=1e-12)


def test_on_continuous_time_a_jump_is_to_a_share_of_the_next_time() -> None:
    grid = FLOW.grid(Trailing(), 4)
    [first, *_] = TCD(gamma=0.25).plan(grid).tables
    s, after = 0.75 * 0.75, 0.75
    # From pure noise x is eps; the part of D at time s is scaled to that at .75.
    eps = s * (1 - after) / (1 - s)
    np.testing.assert_allclose(first, [[eps, 1 - after, (after**2 - eps**2) ** 0.5, 0]])

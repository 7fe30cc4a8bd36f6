"""Predictor-corrector sampling of Score SDE."""

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, integrate
from samplers.gaussian import GaussianDenoiser
from samplers.score_sde_pc import ScoreSDEPC
from samplers.timesteps import Karras, LogSNR, Trailing
from tests.samplers.cases import EDM, FLOW, VP

ROWS, SIZE = 8, 8192
DRAWS = ROWS * SIZE


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_run_is_the_algorithm_of_the_paper_in_variance_exploding_form() -> None:
    """Algorithm 1 with ancestral steps (appendix F) and the corrector of algorithm 4."""
    moves, snr, steps = 2, 0.2, 5
    grid = EDM.grid(Karras(), steps)
    data = GaussianDenoiser(EDM, 0.7, 0.6)
    stages = (moves + 1) * (steps - 1) + 1
    noise = torch.randn(stages, 3, 40, generator=source(1), dtype=torch.float64)
    x = start = 80 * torch.randn(3, 40, generator=source(2), dtype=torch.float64)
    stage = 0
    for sigma, to in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        score = (data(x, sigma) - x) / sigma**2
        mean = x + (sigma**2 - to**2) * score
        x = mean + (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5 * noise[stage]
        stage += 1
        if to == 0:
            x = mean
            break
        for _ in range(moves):
            g = (data(x, to) - x) / to**2
            e = 2 * (snr * noise[stage].norm(dim=1) / g.norm(dim=1)) ** 2
            x = x + e[:, None] * g + (2 * e[:, None]).sqrt() * noise[stage]
            stage += 1
    plan = ScoreSDEPC(snr=snr, corrector_steps=moves).plan(grid)
    assert plan.evaluations == stage == stages
    ours = integrate(plan, data, start, noise.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def marginals(sampler: ScoreSDEPC, schedule: NoiseSchedule, data: GaussianDenoiser) -> list[Tensor]:
    """Draws of x at each evaluation of a run."""
    plan = sampler.plan(schedule.grid(Trailing(), 6))
    draw = source(11)

    def noise(_: int = 0) -> Tensor:
        return torch.randn(ROWS, SIZE, generator=draw, dtype=torch.float64)

    start = plan.alpha[0] * (data.mean + data.deviation * noise()) + plan.sigma[0] * noise()
    seen: list[Tensor] = []
    integrate(plan, lambda x, t: (seen.append(x.clone()), data(x, t))[1], start, noise)
    return seen


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("snr", [0.08, 0.16])
def test_point_data_has_its_marginal_at_every_level(snr: float, schedule: NoiseSchedule) -> None:
    """Exact in the mean; each move adds a fraction 4 snr^4 to the variance, and it stays."""
    sampler = ScoreSDEPC(snr=snr, corrector_steps=2)
    plan = sampler.plan(schedule.grid(Trailing(), 6))
    data = GaussianDenoiser(schedule, 0.7, 0.0)
    error = 5 * (2 / DRAWS) ** 0.5
    for x, alpha, sigma in zip(
        marginals(sampler, schedule, data), plan.alpha[:-1], plan.sigma[:-1], strict=True
    ):
        assert abs(float(x.mean()) - alpha * 0.7) < 5 * sigma / DRAWS**0.5
        # The error inherited from a level shrinks with (alpha sigma' / alpha' sigma)^2 < 1.
        assert -error < float(x.var()) / sigma**2 - 1 < error + 3 * 4 * snr**4 + snr**2 * 0.2


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_the_corrector_mends_what_the_predictor_misses_of_gaussian_data(
    schedule: NoiseSchedule,
) -> None:
    """Ancestral steps lose variance; Langevin moves at each level restore it."""
    data = GaussianDenoiser(schedule, 0.7, 0.6)
    grid = schedule.grid(LogSNR(), 10)
    missed: list[float] = []
    for snr, moves in ((0.01, 1), (0.3, 4)):
        plan = ScoreSDEPC(snr=snr, corrector_steps=moves).plan(grid)
        draw = source(3)

        def noise(_: int = 0, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(ROWS, SIZE, generator=draw, dtype=torch.float64)

        start = plan.alpha[0] * (0.7 + 0.6 * noise()) + plan.sigma[0] * noise()
        missed.append(abs(float(integrate(plan, data, start, noise).var()) - 0.36))
    assert missed[1] < 0.7 * missed[0]


def test_moves_are_at_the_level_that_the_step_reached_and_belong_to_it() -> None:
    plan = ScoreSDEPC(corrector_steps=2).plan(VP.grid(Trailing(), 3))
    assert plan.langevin == (0, 0.16, 0.16, 0, 0.16, 0.16, 0)
    assert plan.step == (0, 0, 0, 1, 1, 1, 2)
    np.testing.assert_array_equal(plan.sigma[[1, 2, 4, 5]], plan.sigma[[3, 3, 6, 6]])
    assert plan.noisy == (True,) * 6 + (False,)

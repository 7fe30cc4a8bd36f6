"""DPM-Solver-fast compared with k-diffusion's sample_dpm_fast, written out in float64."""

import math
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, integrate
from samplers.dpm_fast import DPMFast
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import LogSNR, Trailing
from tests.samplers.cases import EDM, FLOW, VP

DATA = GaussianMixtureDenoiser(EDM)
START = 80 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
NOISE = torch.randn(
    20, *START.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64
)
Steps: TypeAlias = list[tuple[float, float, float, int]]


def noise_of(x: Tensor, t: float) -> Tensor:
    """The noise prediction; times are minus log sigma."""
    return (x - DATA(x, math.exp(-t))) / math.exp(-t)


def single_step(x: Tensor, t: float, to: float, order: int) -> Tensor:
    h, eps = to - t, noise_of(x, t)
    sigma = math.exp(-to)
    x_next = x - sigma * math.expm1(h) * eps
    if order == 1:
        return x_next
    if order == 2:
        s = t + h / 2
        u = x - math.exp(-s) * math.expm1(h / 2) * eps
        return x_next - sigma * math.expm1(h) * (noise_of(u, s) - eps)
    r_1, r_2 = 1 / 3, 2 / 3
    s_1, s_2 = t + r_1 * h, t + r_2 * h
    u_1 = x - math.exp(-s_1) * math.expm1(r_1 * h) * eps
    bend = math.expm1(r_2 * h) / (r_2 * h) - 1
    u_2 = x - math.exp(-s_2) * math.expm1(r_2 * h) * eps
    u_2 = u_2 - math.exp(-s_2) * (r_2 / r_1) * bend * (noise_of(u_1, s_1) - eps)
    return x_next - sigma / r_2 * (math.expm1(h) / h - 1) * (noise_of(u_2, s_2) - eps)


def theirs(evaluations: int, eta: float) -> Tensor:
    m = evaluations // 3 + 1
    left = evaluations % 3
    orders = [3] * (m - 1) + [left] if left else [3] * (m - 2) + [2, 1]
    t_end = -math.log(EDM.t_end)
    ts = torch.linspace(-math.log(80), t_end, m + 1, dtype=torch.float64).tolist()
    x = START
    for i, order in enumerate(orders):
        sigma, to = math.exp(-ts[i]), math.exp(-ts[i + 1])
        up = min(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
        below = min(t_end, -math.log((to**2 - up**2) ** 0.5))
        x = single_step(x, ts[i], below, order)
        x = x + max(to**2 - math.exp(-below) ** 2, 0) ** 0.5 * NOISE[i]
    return x


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_run_with_any_budget_is_that_of_k_diffusion(eta: float) -> None:
    for evaluations in (1, 2, 3, 5, 9, 20):
        grid = EDM.grid(DPMFast.default_spacing, evaluations, t_end=EDM.t_end)
        plan = DPMFast(eta=eta).plan(grid)
        assert plan.evaluations == evaluations
        ours = integrate(plan, DATA, START, lambda stage, plan=plan: NOISE[plan.step[stage]])
        torch.testing.assert_close(ours, theirs(evaluations, eta), rtol=0, atol=1e-10)


def test_steps_lie_as_densely_as_the_spacing_says() -> None:
    """Steps are even by index of the spacing's points, which are even in time here."""
    plan = DPMFast().plan(FLOW.grid(Trailing(), 13))
    starts = [plan.t[stage] for stage in range(plan.evaluations) if plan.opens_step(stage)]
    assert plan.steps == 6
    assert starts == pytest.approx([1 - 2.4 * i / 13 for i in range(6)], abs=4e-3)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_what_moves_a_point_within_a_step_is_kept(schedule: NoiseSchedule) -> None:
    """As inpainting moves x at every stage; the move shrinks in proportion to the noise."""
    plan = DPMFast().plan(schedule.grid(LogSNR(), 9, t_end=0.1))
    for stage in range(plan.evaluations):
        move = torch.eye(plan.slots, dtype=torch.float64)[0]
        for table in plan.tables[stage:]:
            move = torch.from_numpy(table[:, : plan.slots]) @ move
        wanted = float(plan.sigma[-1] / plan.sigma[stage])
        assert float(move[0]) == pytest.approx(wanted, rel=1e-9)

"""Heun's method compared with the published algorithm."""

import pytest
import torch

from samplers import NoiseSchedule, Sampler, integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import GHVB
from samplers.heun import Heun
from samplers.levels import F64
from samplers.noise_schedule import FlowMatching
from samplers.plms import PLMS
from samplers.timesteps import Karras, LogSNR
from tests.samplers.cases import EDM, FLOW, VP


def test_it_is_algorithm_1_of_edm() -> None:
    data = GaussianMixtureDenoiser(EDM)
    grid = EDM.grid(Karras(), 6)
    start = x = torch.linspace(-90, 90, 7, dtype=torch.float64)[None]
    for t, t_next in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        d = (x - data(x, t)) / t
        euler = x + (t_next - t) * d
        if t_next > 0:
            d_next = (euler - data(euler, t_next)) / t_next
            x = x + (t_next - t) * (d + d_next) / 2
        else:
            x = euler
    torch.testing.assert_close(integrate(Heun().plan(grid), data, start), x, rtol=1e-11, atol=1e-12)


def test_on_flow_matching_it_is_heun_on_the_velocity() -> None:
    data = GaussianMixtureDenoiser(FLOW)
    grid = FLOW.grid(LogSNR(), 6, t_start=0.98, t_end=0.05)
    start = x = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    for t, t_next in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        v = (x - data(x, t)) / t
        euler = x + (t_next - t) * v
        x = x + (t_next - t) * (v + (euler - data(euler, t_next)) / t_next) / 2
    torch.testing.assert_close(integrate(Heun().plan(grid), data, start), x, rtol=1e-11, atol=1e-12)


class FlowAlongNoise(FlowMatching):
    """Flow matching's levels, with the line of the other schedules."""

    def line_scale(self, alpha: F64) -> F64:
        return alpha


@pytest.mark.parametrize("sampler", [Heun(), GHVB(), PLMS()], ids=lambda sampler: sampler.name)
def test_solvers_follow_the_line_of_the_schedule_and_ask_for_no_kind(sampler: Sampler) -> None:
    """For flow matching's levels, x / alpha over sigma / alpha is another, equally valid line."""
    data = GaussianMixtureDenoiser(FLOW)
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    exact = data.transport(x, 0.95, 0.05)
    along, own = (
        integrate(sampler.plan(schedule.grid(LogSNR(), 160, 0.95, 0.05)), data, x)
        for schedule in (FlowAlongNoise(), FLOW)
    )
    assert not torch.allclose(along, own, rtol=0, atol=1e-7)
    torch.testing.assert_close(along, exact, rtol=0, atol=2e-3)


def test_on_variance_preserving_levels_it_is_heun_in_x_over_alpha() -> None:
    data = GaussianMixtureDenoiser(VP)
    grid = VP.grid(LogSNR(), 6, t_start=1.0, t_end=0.05)
    start = x = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    for i in range(grid.steps):
        (t, a, s), (t2, a2, s2) = (
            (float(grid.t[j]), float(grid.alpha[j]), float(grid.sigma[j])) for j in (i, i + 1)
        )
        eps = (x - a * data(x, t)) / s
        euler = a2 * (x / a + (s2 / a2 - s / a) * eps)
        eps2 = (euler - a2 * data(euler, t2)) / s2
        x = a2 * (x / a + (s2 / a2 - s / a) * (eps + eps2) / 2)
    torch.testing.assert_close(integrate(Heun().plan(grid), data, start), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_history_is_dropped_at_the_end_of_each_step(schedule: NoiseSchedule) -> None:
    plan = Heun().plan(schedule.grid(LogSNR(), 4))
    assert plan.step == (0, 0, 1, 1, 2, 2, 3)
    assert not plan.tables[1::2, 1:].any()

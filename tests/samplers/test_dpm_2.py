"""The midpoint method compared with k-diffusion's samplers, written out, and with diffusers."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete as ancestral
from torch import Tensor

from samplers import Grid, NoiseSchedule, Spacing, integrate
from samplers.dpm_2 import DPM2
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import Karras, LogSNR, Trailing
from tests.samplers.cases import EDM, FLOW, SCHEDULES

NOISE = torch.randn(20, 1, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_it_is_that_of_k_diffusion(eta: float) -> None:
    """sample_dpm_2_ancestral, which is sample_dpm_2 at eta 0; noise is drawn per stage of ours."""
    data = GaussianMixtureDenoiser(EDM)
    grid = EDM.grid(Karras(), 5)
    start = x = 80 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
    for i, (sigma, to) in enumerate(zip(grid.sigma[:-1], grid.sigma[1:], strict=True)):
        d = (x - data(x, sigma)) / sigma
        if to == 0:
            x = x - sigma * d
            break
        up = eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
        down = (to**2 - up**2) ** 0.5
        middle = (sigma * down) ** 0.5
        half = x + (middle - sigma) * d
        d = (half - data(half, middle)) / middle
        x = x + (down - sigma) * d + up * NOISE[2 * i + 1]
    plan = DPM2(eta=eta).plan(grid)
    ours = integrate(plan, data, start, NOISE.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def test_on_flow_matching_it_is_the_midpoint_of_the_velocity() -> None:
    """ComfyUI's sample_dpm_2 on such models."""
    data = GaussianMixtureDenoiser(FLOW)
    grid = FLOW.grid(Trailing(), 5)
    start = x = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    for t, to in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        v = (x - data(x, t)) / t
        if to == 0:
            x = x - t * v
            break
        middle = (t * to) ** 0.5
        half = x + (middle - t) * v
        x = x + (to - t) * (half - data(half, middle)) / middle
    torch.testing.assert_close(integrate(DPM2().plan(grid), data, start), x, rtol=1e-11, atol=1e-11)


# Theirs hands tensors to numpy.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "eta"), [(KDPM2DiscreteScheduler, 0.0), (KDPM2AncestralDiscreteScheduler, 1.0)]
)
def test_it_is_diffusers_scheduler(kind: Any, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network that ignores the time, as diffusers interpolates differently between times."""
    draws = iter(NOISE)
    monkeypatch.setattr(ancestral, "randn_tensor", lambda *_, **__: next(draws))
    config: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    scheduler = kind(**config)
    scheduler.set_timesteps(10)
    schedule = SCHEDULES["scaled_linear"]
    plan = DPM2(eta=eta).plan(schedule.grid("linspace", 10))

    def network(x: Tensor) -> Tensor:
        return torch.sin(1.7 * x)

    start = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    x = start / plan.alpha[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x)[0]
    levels = iter(zip(plan.alpha, plan.sigma, strict=True))

    def denoise(x: Tensor, _: float) -> Tensor:
        alpha, sigma = next(levels)
        return (x - sigma * network(x)) / alpha

    ours = integrate(plan, denoise, start, lambda stage: NOISE[stage // 2])
    error = float((ours - x).norm() / x.norm())
    assert error < 5e-6, error


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("scaled_linear", LogSNR()),
        ("flow", LogSNR()),
        ("trigflow", LogSNR()),
        # From pure noise.
        ("flow", Trailing()),
        ("trigflow", Trailing()),
    ],
)
def test_an_ancestral_step_lands_with_the_noise_of_the_next_level(
    name: str, spacing: Spacing
) -> None:
    """The remaining and the drawn noise together have its variance, at any level."""
    schedule: NoiseSchedule = SCHEDULES[name]
    grid: Grid = schedule.grid(spacing, 6)
    plan = DPM2(eta=1.0).plan(grid)
    point = torch.full((1, 20_000), 0.4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)

    def noise(stage: int = 0) -> Tensor:
        return torch.randn(point.shape, generator=generator, dtype=torch.float64)

    seen: list[Tensor] = []

    def denoise(x: Tensor, _: float) -> Tensor:
        seen.append(x.clone())
        return point

    integrate(plan, denoise, plan.alpha[0] * point + plan.sigma[0] * noise(), noise)
    for stage, x in enumerate(seen):
        deviation = float((x - plan.alpha[stage] * point).std())
        assert deviation == pytest.approx(plan.sigma[stage], rel=0.03)
    assert np.isfinite(plan.tables).all()

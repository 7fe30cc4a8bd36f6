"""Samplers that ComfyUI and RES4LYF have by other names, written out in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.names import named
from samplers.other_names import COMFYUI_SAMPLERS
from samplers.timesteps import Karras
from tests.samplers.cases import EDM, SCHEDULES

DATA = GaussianMixtureDenoiser(EDM)
GRID = EDM.grid(Karras(), 9)
STEPS = list(zip(GRID.sigma[:-1].tolist(), GRID.sigma[1:].tolist(), strict=True))
START = 80 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
NOISE = torch.randn(9, 1, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ddpm() -> Tensor:
    """The ancestral step of Ho et al., on the unit-variance x."""
    x = START
    for noise, (sigma, to) in zip(NOISE, STEPS, strict=True):
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + to**2)
        alpha = bar / bar_next
        eps = (x - DATA(x, sigma)) / sigma
        unit = (x * bar**0.5 - (1 - alpha) / (1 - bar) ** 0.5 * eps) / alpha**0.5
        if to > 0:
            unit = unit + ((1 - alpha) * (1 - bar_next) / (1 - bar)) ** 0.5 * noise
        x = unit / bar_next**0.5
    return x


def res_multistep() -> Tensor:
    """The second-order exponential multistep of Zhang et al. (arXiv 2308.02157)."""
    x, older, before = START, None, 0.0
    for sigma, to in STEPS:
        D = DATA(x, sigma)
        if to == 0:
            return D
        if older is None:
            x = x + (to - sigma) * (x - D) / sigma
        else:
            h = np.log(sigma / to)
            phi_1 = -np.expm1(-h) / h
            of_older = (1 - phi_1) / h / (np.log(sigma / before) / h)
            x = np.exp(-h) * x + h * ((phi_1 - of_older) * D + of_older * older)
        older, before = D, sigma
    return x


def res_2s() -> Tensor:
    """The exponential Runge-Kutta method of two stages, the second in the middle."""
    x = START
    for sigma, to in STEPS:
        D = DATA(x, sigma)
        if to == 0:
            return D
        h, middle = np.log(sigma / to), (sigma * to) ** 0.5
        half = np.exp(-h / 2) * x - np.expm1(-h / 2) * D
        phi_1 = -np.expm1(-h) / h
        of_half = 2 * (1 - phi_1) / h
        x = np.exp(-h) * x + h * ((phi_1 - of_half) * D + of_half * DATA(half, middle))
    return x


def ipndm() -> Tensor:
    """Adams-Bashforth with the weights of even steps; here with them in the last step too."""
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    weights.append([55 / 24, -59 / 24, 37 / 24, -9 / 24])
    x, slopes = START, list[Tensor]()
    for sigma, to in STEPS:
        slopes.insert(0, (x - DATA(x, sigma)) / sigma)
        used = weights[min(len(slopes), 4) - 1]
        for weight, slope in zip(used, slopes, strict=False):
            x = x + (to - sigma) * weight * slope
    return x


@pytest.mark.parametrize(
    "theirs", [ddpm, res_multistep, res_2s, ipndm], ids=lambda one: one.__name__
)
def test_whole_runs_are_theirs(theirs: Callable[[], Tensor]) -> None:
    sampler, _ = named(theirs.__name__)
    ours = integrate(sampler.plan(GRID), DATA, START, NOISE.__getitem__)
    torch.testing.assert_close(ours, theirs(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", COMFYUI_SAMPLERS)
def test_every_sampler_named_builds_a_plan(name: str) -> None:
    sampler, spacing = named(name)
    assert spacing is None
    plan = sampler.plan(SCHEDULES["scaled_linear"].grid(sampler.default_spacing, 10))
    assert np.isfinite(plan.tables).all()

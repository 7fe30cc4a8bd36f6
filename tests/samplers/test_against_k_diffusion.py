"""AUTOMATIC1111's DPM++ samplers compared with k-diffusion's, written out in float64.

Crowson, k-diffusion, sampling.py: sample_dpmpp_2m, sample_dpmpp_2m_sde, sample_dpmpp_3m_sde.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samplers import integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.names import named
from tests.covering import EVERY_CELL
from tests.samplers.cases import EDM

DATA = GaussianMixtureDenoiser(EDM)
START = 80 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
NOISE = torch.randn(
    30, *START.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)


def second_order(sigmas: Tensor, eta: float, solver_type: str) -> Tensor:
    """2M (eta 0, midpoint) and 2M SDE."""
    x, before, h_before = START, None, None
    for sigma, to, noise in zip(sigmas[:-1], sigmas[1:], NOISE, strict=False):
        denoised = DATA(x, float(sigma))
        if to == 0:
            return denoised
        h = (sigma / to).log()
        z = (1 + eta) * h
        x = to / sigma * (-eta * h).exp() * x - torch.expm1(-z) * denoised
        if before is not None and h_before is not None:
            slope = (denoised - before) * h / h_before
            weight = torch.expm1(-z) / z + 1 if solver_type == "heun" else -torch.expm1(-z) / 2
            x = x + weight * slope
        x = x + noise * to * (-torch.expm1(-2 * eta * h)).sqrt()
        before, h_before = denoised, h
    raise AssertionError("the last sigma is 0")


def third_order_sde(sigmas: Tensor) -> Tensor:
    """3M SDE, eta 1."""
    x, known, lengths = START, list[Tensor](), list[Tensor]()
    for sigma, to, noise in zip(sigmas[:-1], sigmas[1:], NOISE, strict=False):
        known.insert(0, DATA(x, float(sigma)))
        if to == 0:
            return known[0]
        lengths.insert(0, (sigma / to).log())
        z = 2 * lengths[0]
        x = torch.exp(-z) * x - torch.expm1(-z) * known[0]
        phi_2 = torch.expm1(-z) / z + 1
        if len(known) == 2:
            x = x + phi_2 * (known[0] - known[1]) * lengths[0] / lengths[1]
        if len(known) > 2:
            r0, r1 = lengths[1] / lengths[0], lengths[2] / lengths[0]
            newer, older = (known[0] - known[1]) / r0, (known[1] - known[2]) / r1
            d1 = newer + (newer - older) * r0 / (r0 + r1)
            d2 = (newer - older) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / z - 0.5) * d2
        x = x + noise * to * (-torch.expm1(-z)).sqrt()
    raise AssertionError("the last sigma is 0")


LENGTHS = range(1, 31) if EVERY_CELL else (1, 2, 3, 4, 7, 14, 15, 30)
"""Short runs, runs around the number below which others lower the order, and a long run."""


@pytest.mark.parametrize("schedule_type", ["Karras", "Exponential"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("DPM++ 2M", lambda sigmas: second_order(sigmas, 0.0, "midpoint")),
        ("DPM++ 2M SDE", lambda sigmas: second_order(sigmas, 1.0, "midpoint")),
        ("DPM++ 2M SDE Heun", lambda sigmas: second_order(sigmas, 1.0, "heun")),
        ("DPM++ 3M SDE", third_order_sde),
    ],
)
def test_a_run_of_any_length_is_that_of_k_diffusion(
    name: str, theirs: Callable[[Tensor], Tensor], schedule_type: str
) -> None:
    sampler, spacing = named(f"{name} {schedule_type}")
    assert spacing is not None
    for steps in LENGTHS:
        grid = EDM.grid(spacing, steps)
        ours = integrate(sampler.plan(grid), DATA, START, NOISE.__getitem__)
        expected = theirs(torch.from_numpy(grid.sigma))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)

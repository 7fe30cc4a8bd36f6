"""Samplers that have other names in ComfyUI and RES4LYF, written out in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
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
NOISE = torch.randn(27, 1, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ddpm() -> Tensor:
    """The ancestral step of Ho et al., on the unit-variance x."""
    x = START
    for noise, (sigma, to) in zip(NOISE, STEPS, strict=False):
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
    """Adams-Bashforth with the weights of even steps, here also in the last step."""
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    weights.append([55 / 24, -59 / 24, 37 / 24, -9 / 24])
    x, slopes = START, list[Tensor]()
    for sigma, to in STEPS:
        slopes.insert(0, (x - DATA(x, sigma)) / sigma)
        used = weights[min(len(slopes), 4) - 1]
        for weight, slope in zip(used, slopes, strict=False):
            x = x + (to - sigma) * weight * slope
    return x


def lms() -> Tensor:
    """k-diffusion's LMS: integrals of Lagrange polynomials over the noise level."""
    sigmas, x, slopes = GRID.sigma, START, list[Tensor]()
    for i, sigma in enumerate(sigmas[:-1]):
        slopes.insert(0, (x - DATA(x, float(sigma))) / sigma)
        nodes = sigmas[i::-1][:4]
        for slope, node in zip(slopes, nodes, strict=False):
            others = [one for one in nodes if one != node]
            scale = np.prod(node - np.array(others))
            basis = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1] / scale)
            x = x + (basis.integ()(sigmas[i + 1]) - basis.integ()(sigma)) * slope
    return x


def heunpp2() -> Tensor:
    """Up to three slopes, weighted by the noise at their levels."""
    sigmas, x = GRID.sigma, START
    for i in range(GRID.steps):
        ahead, slopes = x, list[Tensor]()
        levels = sigmas[i:-1][:3]
        for j, sigma in enumerate(levels, i):
            slopes.append((ahead - DATA(ahead, float(sigma))) / sigma)
            ahead = ahead + slopes[-1] * (sigmas[j + 1] - sigma)
        weights = [level / (len(levels) * sigmas[0]) for level in levels[1:]]
        mean = (1 - sum(weights)) * slopes[0]
        for weight, slope in zip(weights, slopes[1:], strict=True):
            mean = mean + weight * slope
        x = x + (sigmas[i + 1] - sigmas[i]) * mean
    return x


def res_multistep_ancestral() -> Tensor:
    """res_multistep to below the next level, followed by noise up to that level."""
    x, older, before, below_before = START, None, 0.0, 0.0
    for noise, (sigma, to) in zip(NOISE, STEPS, strict=False):
        D = DATA(x, sigma)
        if to == 0:
            return D
        up = min(to, (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
        below = (to**2 - up**2) ** 0.5
        if older is None:
            x = x + (below - sigma) * (x - D) / sigma
        else:
            h = np.log(sigma / below)
            phi_1 = -np.expm1(-h) / h
            of_older = (1 - phi_1) / h / (np.log(below_before / before) / h)
            x = np.exp(-h) * x + h * ((phi_1 - of_older) * D + of_older * older)
        x = x + up * noise
        older, before, below_before = D, sigma, below
    return x


def seeds(points: tuple[float, ...], eta: float, *, phi_2: bool) -> Tensor:
    """The exponential Runge-Kutta method with its last two slopes, and noise as increments."""
    x, draws = START, iter(NOISE)
    for sigma, to in STEPS:
        D = [DATA(x, sigma)]
        if to == 0:
            return D[0]
        h, noise, before, landed = np.log(sigma / to), torch.zeros_like(x), 0.0, x
        for share, newest in zip((*points, 1.0), (0.0, *points), strict=True):
            z = (1 + eta) * share * h
            of_newest = 0.0
            if newest and (phi_2 or share < 1):
                of_newest = share / newest * (1 - -np.expm1(-z) / z)
            elif newest:
                of_newest = -np.expm1(-z) / (2 * newest)
            mean = -np.expm1(-z) * D[0] + of_newest * (D[-1] - D[0])
            noise = np.exp(-eta * (share - before) * h) * noise
            noise = noise + (-np.expm1(-2 * eta * (share - before) * h)) ** 0.5 * next(draws)
            at = sigma * np.exp(-share * h)
            landed = np.exp(-z) * x + mean + at * noise
            before = share
            if share < 1 or len(D) < len(points) + 1:
                D.append(DATA(landed, at))
        x = landed
    raise AssertionError("the last sigma is 0")


def seeds_2() -> Tensor:
    return seeds((1 / 2,), 1.0, phi_2=False)


def seeds_3() -> Tensor:
    return seeds((1 / 3, 2 / 3), 1.0, phi_2=True)


def exp_heun_2_x0() -> Tensor:
    return seeds((1.0,), 0.0, phi_2=True)


def exp_heun_2_x0_sde() -> Tensor:
    return seeds((1.0,), 1.0, phi_2=True)


def er_sde() -> Tensor:
    """Order 3, with the authors' sums of 200 points."""

    def phi(r: Any) -> Any:
        return r * (np.exp(r**0.3) + 10)

    r, x, known, slopes = GRID.sigma, START, list[Tensor](), list[Tensor]()
    for i, noise in enumerate(NOISE[: GRID.steps]):
        known.insert(0, DATA(x, float(r[i])))
        if r[i + 1] == 0:
            return known[0]
        kept, dt = phi(r[i + 1]) / phi(r[i]), r[i + 1] - r[i]
        x = kept * x + (1 - kept) * known[0]
        at = r[i + 1] - np.arange(200) * dt / 200
        if i > 0:
            slopes.insert(0, (known[0] - known[1]) / (r[i] - r[i - 1]))
            total = np.sum(1 / phi(at)) * -dt / 200
            x = x + (dt + total * phi(r[i + 1])) * slopes[0]
        if i > 1:
            bend = (slopes[0] - slopes[1]) / ((r[i] - r[i - 2]) / 2)
            total = np.sum((at - r[i]) / phi(at)) * -dt / 200
            x = x + (dt**2 / 2 + total * phi(r[i + 1])) * bend
        x = x + (r[i + 1] ** 2 - (r[i] * kept) ** 2) ** 0.5 * noise
    raise AssertionError("the last sigma is 0")


def adams(lams: list[float], start: float, end: float, tau: float) -> list[float]:
    """Weights of predictions at ``lams`` in a step of SA-Solver, over alpha, by quadrature."""
    c, weights = 1 + tau**2, list[float]()
    for lam in lams:
        others = [one for one in lams if one != lam]
        basis = np.poly1d(np.poly(others)) / np.prod(lam - np.array(others))

        def integrand(r: float, basis: Any = basis) -> float:
            return c * np.exp(-c * (end - r)) * basis(r)

        weights.append(quad(integrand, start, end, epsabs=1e-14, epsrel=1e-13)[0])
    return weights


def test_sa_solver_pece_is_theirs() -> None:
    """Predictor 3, corrector 4, noise between 20 and 80 % of the trained times, in x / alpha."""
    schedule = SCHEDULES["scaled_linear"]
    data, grid = GaussianMixtureDenoiser(schedule), schedule.grid(Karras(), 8)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    trained = 0.5 * np.log(1 / np.cumprod(1 - betas) - 1)
    end, start = np.exp(np.interp([0.2 * 999, 0.8 * 999], np.arange(1000), trained))
    sigmas = (grid.sigma / grid.alpha).tolist()
    lam = -np.log(sigmas[:-1])
    sent = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    x, known, tau, drawn = sent / grid.alpha[0], list[Tensor](), 0.0, torch.zeros_like(sent)

    def denoised(x: Tensor, i: int) -> Tensor:
        return data(x * grid.alpha[i], float(grid.t[i]))

    corrected, taus = x, list[float]()
    for i in range(grid.steps):
        known = [*known, denoised(x, i)][-4:]
        if i > 0:
            order = min(4, i + 1, grid.steps - i)
            weights = adams(lam[i - order + 1 : i + 1].tolist(), lam[i - 1], lam[i], tau)
            decay = np.exp(-(tau**2) * (lam[i] - lam[i - 1]))
            corrected = sigmas[i] / sigmas[i - 1] * decay * corrected + drawn
            corrected = corrected + sum(w * D for w, D in zip(weights, known[-order:], strict=True))
            known[-1] = denoised(corrected, i)
        if sigmas[i + 1] == 0:
            corrected = known[-1]
            break
        tau = 1.0 if start >= sigmas[i + 1] >= end else 0.0
        taus.append(tau)
        order = min(3, i + 1, grid.steps - 1 - i)
        weights = adams(lam[i - order + 1 : i + 1].tolist(), lam[i], lam[i + 1], tau)
        h = lam[i + 1] - lam[i]
        drawn = NOISE[2 * i] * sigmas[i + 1] * (-np.expm1(-2 * tau**2 * h)) ** 0.5
        x = sigmas[i + 1] / sigmas[i] * np.exp(-(tau**2) * h) * corrected + drawn
        x = x + sum(w * D for w, D in zip(weights, known[-order:], strict=True))
    assert set(taus) == {0.0, 1.0}
    sampler, _ = named("sa_solver_pece_gpu")
    ours = integrate(sampler.plan(grid), data, sent, NOISE.__getitem__)
    torch.testing.assert_close(ours, corrected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "theirs",
    [
        *(ddpm, res_multistep, res_multistep_ancestral, res_2s, ipndm, lms, heunpp2, er_sde),
        *(seeds_2, seeds_3, exp_heun_2_x0, exp_heun_2_x0_sde),
    ],
    ids=lambda one: one.__name__,
)
def test_whole_runs_are_theirs(theirs: Callable[[], Tensor]) -> None:
    sampler, _ = named(theirs.__name__)
    ours = integrate(sampler.plan(GRID), DATA, START, NOISE.__getitem__)
    torch.testing.assert_close(ours, theirs(), rtol=1e-10, atol=1e-10)


def test_every_sampler_named_builds_a_plan() -> None:
    for name in COMFYUI_SAMPLERS:
        sampler, spacing = named(name)
        assert spacing is None, name
        plan = sampler.plan(SCHEDULES["scaled_linear"].grid(sampler.default_spacing, 10))
        assert np.isfinite(plan.tables).all(), name

"""Particles weighted by Feynman-Kac correctors, compared with distributions in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance.feynman_kac import FeynmanKac, ancestors, effective, increments
from samplers import NoiseSchedule, Plan, Sampler, integrate
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from samplers.timesteps import LogSNR
from tests.covering import few_of

EXACT = FeynmanKac(bound=1e6)
EDM, VP, FLOW = NoiseSchedule.edm(), NoiseSchedule.vp_linear(), NoiseSchedule.flow()


@dataclass
class Guided:
    """Two exact denoisers with plain guidance, whose particles may be resampled every step."""

    cond: GaussianDenoiser | GaussianMixtureDenoiser
    other: GaussianDenoiser | GaussianMixtureDenoiser
    scale: float
    plan: Plan
    corrected: FeynmanKac | None = None
    stage: int = 0
    log_weights: Tensor | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.corrected is not None and self.log_weights is not None:
            shares = self.corrected.weights(self.log_weights.numpy())
            draw = np.random.default_rng(self.stage).random()
            x.copy_(x[ancestors(shares, draw)])
        cond, other = self.cond(x, t), self.other(x, t)
        if self.stage + 1 < self.plan.evaluations:
            with np.errstate(divide="ignore"):
                snr = np.square(self.plan.alpha / self.plan.sigma)
            now, then = float(snr[self.stage]), float(snr[self.stage + 1])
            self.log_weights = increments(cond, other, self.scale, now, then)
        self.stage += 1
        return cond + (self.scale - 1) * (cond - other)


def drawn(guided: Guided, particles: int = 10_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def noise(_: int = 0) -> Tensor:
        return torch.randn(particles, 1, 1, 1, generator=generator, dtype=torch.float64)

    start = guided.plan.start_scale * noise()
    return integrate(guided.plan, guided, start, noise).flatten()


def product(cond: tuple[float, float], other: tuple[float, float], w: float) -> tuple[float, float]:
    """Mean and variance of ``N(m_u, s_u)^(1 - w) N(m_c, s_c)^w``: precisions add."""
    (m_c, s_c), (m_u, s_u) = cond, other
    precision = w / s_c**2 + (1 - w) / s_u**2
    return (w * m_c / s_c**2 + (1 - w) * m_u / s_u**2) / precision, 1 / precision


# Mean and deviation with and without the prompt, and the scale. The product's moments are known.
SHARP, WIDE = ((1.0, 0.5), (0.0, 1.0), 2.0), ((0.5, 0.7), (-0.5, 0.9), 3.0)


@pytest.mark.parametrize(
    ("schedule", "case"),
    few_of([(VP, WIDE), (FLOW, SHARP), (EDM, SHARP)], [(VP, WIDE), (FLOW, SHARP)]),
)
def test_weighted_particles_sample_the_product_and_plain_guidance_does_not(
    schedule: NoiseSchedule, case: tuple[tuple[float, float], tuple[float, float], float]
) -> None:
    cond, other, scale = case
    plan = DDIM(eta=1).plan(schedule.grid(LogSNR(), 250))
    mean, variance = product(cond, other, scale)
    sides = GaussianDenoiser(schedule, *cond), GaussianDenoiser(schedule, *other)
    corrected = drawn(Guided(*sides, scale, plan, EXACT))
    plain = drawn(Guided(*sides, scale, plan), 2_000)
    # Three deviations of the mean of 10,000 draws are .015; the rest is discretization error.
    assert float(corrected.mean()) == pytest.approx(mean, abs=0.03)
    assert float(corrected.var()) == pytest.approx(variance, rel=0.08)
    assert abs(float(plain.mean()) - mean) > 0.09
    assert float(plain.var()) < 0.85 * variance


def test_the_steps_error_falls_with_their_number() -> None:
    cond, other, scale = WIDE
    _, variance = product(cond, other, scale)
    errors = []
    for steps in (15, 60, 240):
        plan = DDIM(eta=1).plan(EDM.grid(LogSNR(), steps))
        sides = GaussianDenoiser(EDM, *cond), GaussianDenoiser(EDM, *other)
        errors.append(abs(float(drawn(Guided(*sides, scale, plan, EXACT)).var()) - variance))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("sampler", [DDIM(eta=1), DPMSolverPP(variant="sde")], ids=repr)
def test_a_product_of_mixtures_is_sampled_in_its_modes_shares(sampler: Sampler) -> None:
    schedule, scale = EDM, 2.0
    cond = GaussianMixtureDenoiser(schedule, (0.3, 0.7), (-1.0, 1.0), (0.4, 0.3))
    other = GaussianMixtureDenoiser(schedule, (0.6, 0.4), (-0.8, 0.9), (0.6, 0.7))
    plan = sampler.plan(schedule.grid(LogSNR(), 120))

    def density(mixture: GaussianMixtureDenoiser, x: np.ndarray) -> np.ndarray:
        parts = zip(mixture.weights, mixture.means, mixture.deviations, strict=True)
        return np.sum([w / s * np.exp(-0.5 * ((x - m) / s) ** 2) for w, m, s in parts], axis=0)

    x = np.linspace(-8, 8, 8001)
    meant = density(other, x) ** (1 - scale) * density(cond, x) ** scale
    meant /= meant.sum()
    corrected = drawn(Guided(cond, other, scale, plan, EXACT)).numpy()
    plain = drawn(Guided(cond, other, scale, plan), 2_000).numpy()
    below = float(meant[x < 0].sum())
    assert (corrected < 0).mean() == pytest.approx(below, abs=0.015)
    assert abs((plain < 0).mean() - below) > 0.03
    assert corrected.mean() == pytest.approx(float(meant @ x), abs=0.04)


def test_the_increment_is_the_papers_rate_over_a_short_step() -> None:
    generator = torch.Generator().manual_seed(1)
    cond, other, x = torch.randn(3, 5, 4, 3, 2, generator=generator, dtype=torch.float64)
    sigma, dt, w = 3.0, 1e-6, 2.5
    # Variance exploding: g^2 = 2 sigma, and a score is (D - x) / sigma^2.
    scores = (cond - x) / sigma**2, (other - x) / sigma**2
    rate = w * (w - 1) * sigma * (scores[0] - scores[1]).square().sum((1, 2, 3))
    ours = increments(cond, other, w, sigma**-2, (sigma - dt) ** -2)
    torch.testing.assert_close(ours, rate * dt, rtol=1e-5, atol=0)


def test_the_increment_is_the_ratio_of_the_kernels_of_one_ancestral_step() -> None:
    """K_u^(1 - w) K_c^w / K_w of the Gaussians around each model's posterior mean, at any x'."""
    generator = torch.Generator().manual_seed(2)
    x, cond, other, landed = torch.randn(4, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
    r, r_next, w = 1.3, 0.6, 3.0
    share = (r_next / r) ** 2
    variance = r_next**2 * (1 - share)

    def log_kernel(denoised: Tensor) -> Tensor:
        mean = share * x + (1 - share) * denoised
        return -(landed - mean).square().sum() / (2 * variance)

    guided = other + w * (cond - other)
    ratio = (1 - w) * log_kernel(other) + w * log_kernel(cond) - log_kernel(guided)
    ours = increments(cond, other, w, r**-2, r_next**-2)
    torch.testing.assert_close(ours, ratio[None], rtol=1e-9, atol=1e-9)


def test_without_a_difference_or_at_scale_one_all_weigh_the_same() -> None:
    cond, other = torch.randn(2, 3, 4, 2, 2)
    assert increments(cond, cond, 4.0, 0.0, 1.0).tolist() == [0, 0, 0]
    assert increments(cond, other, 1.0, 0.0, 1.0).tolist() == [0, 0, 0]


def test_log_weights_are_centred_and_cut_off() -> None:
    shares = FeynmanKac(bound=1.0).weights(np.array([0.0, 0.4, 100.0, -40.0]))
    assert np.log(shares.max() / shares.min()) == pytest.approx(2)
    exact = EXACT.weights(np.log([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(exact, [0.125, 0.25, 0.625])
    far = EXACT.weights(np.array([1e6, 0.0]))
    assert far.tolist() == [1, 0]


def test_what_is_not_finite_has_no_share_and_moves_no_other() -> None:
    odd = FeynmanKac().weights(np.array([0.3, np.nan, -0.2, np.inf]))
    alone = FeynmanKac().weights(np.array([0.3, -0.2]))
    assert odd[[1, 3]].tolist() == [0, 0]
    np.testing.assert_array_equal(odd[[0, 2]], alone)
    assert FeynmanKac().weights(np.array([np.nan, np.inf])).tolist() == [0.5, 0.5]


shares = st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda values: sum(values) > 0)
draws = st.floats(0, 1, exclude_max=True)


@given(shares, draws)
def test_each_has_as_many_heirs_as_its_share_up_to_one_and_survivors_stay(
    values: list[float], uniform: float
) -> None:
    weights = np.array(values) / sum(values)
    origins = ancestors(weights, uniform)
    heirs = np.bincount(origins, minlength=len(weights))
    assert len(origins) == len(weights)
    assert np.all(np.abs(heirs - len(weights) * weights) < 1 + 1e-6)
    assert all(weights[origin] > 0 for origin in origins)
    assert all(origins[i] == i for i in range(len(weights)) if heirs[i])


def test_over_all_draws_heirs_are_in_proportion() -> None:
    weights = np.array([0.05, 0.5, 0.0, 0.3, 0.15])
    grid = (np.arange(4000) + 0.5) / 4000
    heirs = sum(np.bincount(ancestors(weights, u), minlength=5) for u in grid) / len(grid)
    np.testing.assert_allclose(heirs, 5 * weights, atol=2e-3)


def test_equal_shares_leave_everything_as_it_is() -> None:
    assert ancestors(np.full(7, 1 / 7), 0.37) == list(range(7))
    assert ancestors(np.full(7, 1 / 7), 0.999) == list(range(7))


def test_the_effective_number_is_of_those_that_count() -> None:
    assert effective(np.array([0.25, 0.25, 0.25, 0.25])) == pytest.approx(4)
    assert effective(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)
    assert effective(np.array([1.0, 0.0])) == 1

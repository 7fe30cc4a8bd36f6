"""The ground truth: denoisers compared with posteriors, and flows with an integrator."""

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from tests.samplers.cases import EDM, FLOW, VP

MIXTURE = {"weights": (0.3, 0.7), "means": (-1.2, 0.5), "deviations": (0.3, 0.6)}


@pytest.mark.parametrize(
    ("schedule", "t"), [(VP, 0.4), (FLOW, 0.6), (FLOW, 1.0), (EDM, 1.3)], ids=str
)
def test_mixture_denoiser_is_the_posterior_mean(schedule: NoiseSchedule, t: float) -> None:
    """By numerical integration of x0 p(x0) p(x | x0)."""
    alpha, sigma = (float(level) for level in schedule.level(np.array(t)))
    grid = np.linspace(-6, 6, 24_001)
    prior = sum(
        w * np.exp(-(((grid - m) / c) ** 2) / 2) / c
        for w, m, c in zip(*MIXTURE.values(), strict=True)
    )
    data = GaussianMixtureDenoiser(schedule, **MIXTURE)
    for x in (-1.5, 0.1, 0.8):
        joint = prior * np.exp(-(((x - alpha * grid) / sigma) ** 2) / 2)
        expected = (grid * joint).sum() / joint.sum()
        found = float(data(torch.tensor(x, dtype=torch.float64), t))
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("schedule", "t"), [(VP, 0.4), (FLOW, 0.6), (EDM, 1.3)], ids=str)
def test_one_gaussian_is_a_mixture_of_one(schedule: NoiseSchedule, t: float) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    one = GaussianDenoiser(schedule, 0.4, 0.7)
    mixture = GaussianMixtureDenoiser(schedule, (1.0,), (0.4,), (0.7,))
    torch.testing.assert_close(one(x, t), mixture(x, t))
    torch.testing.assert_close(one.transport(x, t, t / 3), mixture.transport(x, t, t / 3))


@pytest.mark.parametrize(
    ("schedule", "t_from", "t_to"),
    [(VP, 0.9, 0.05), (FLOW, 0.95, 0.1), (EDM, 5.0, 0.1)],
    ids=["vp", "flow", "edm"],
)
def test_transport_is_the_probability_flow(
    schedule: NoiseSchedule, t_from: float, t_to: float
) -> None:
    """By the classical Runge-Kutta method in x / alpha over log SNR, in 500 steps."""
    data = GaussianMixtureDenoiser(schedule, **MIXTURE)
    first, last = schedule.half_log_snr(np.array([t_from, t_to]))
    lam = np.linspace(first, last, 1001)
    times = schedule.time_of_half_log_snr(lam)
    x = torch.linspace(-1.4, 1.4, 8, dtype=torch.float64)
    alpha, _ = schedule.level(times)

    def slope(y: torch.Tensor, i: int) -> torch.Tensor:
        # d(x/alpha)/d(lam) = D - x/alpha
        return data(alpha[i] * y, times[i]) - y

    y, h = x / alpha[0], 2 * float(lam[1] - lam[0])
    for i in range(0, 1000, 2):
        k1 = slope(y, i)
        k2 = slope(y + h / 2 * k1, i + 1)
        k3 = slope(y + h / 2 * k2, i + 1)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, i + 2))
    torch.testing.assert_close(
        data.transport(x, t_from, t_to), alpha[-1] * y, rtol=1e-9, atol=1e-10
    )


def test_transport_of_a_gaussian_is_the_published_solution() -> None:
    """y_t = mu + (y_s - mu) sqrt((c^2 + e^(-2 lam_t)) / (c^2 + e^(-2 lam_s))), y = x / alpha."""
    data = GaussianDenoiser(VP, 0.3, 0.8)
    (alpha, alpha_to), _ = VP.level(np.array([0.7, 0.2]))
    lam, lam_to = VP.half_log_snr(np.array([0.7, 0.2]))
    ratio = np.sqrt((0.64 + np.exp(-2 * lam_to)) / (0.64 + np.exp(-2 * lam)))
    x = torch.tensor([1.7], dtype=torch.float64)
    expected = alpha_to * (0.3 + (x / alpha - 0.3) * ratio)
    torch.testing.assert_close(data.transport(x, 0.7, 0.2), expected)


def test_data_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"deviations are \(-1,\); they must be finite and at least"
    ):
        GaussianDenoiser(VP, 0, -1)
    with pytest.raises(ValueError, match=r"means are \(nan,\); they must be finite"):
        GaussianDenoiser(VP, np.nan)
    with pytest.raises(ValueError, match="an entry of means is '1'; it must be a number"):
        GaussianDenoiser(VP, "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights, means and deviations have 2, 1 and 2 entries"):
        GaussianMixtureDenoiser(VP, means=(0.0,))
    for weights in ((0.5, 0.6), (1.5, -0.5), (np.nan, 0.5)):
        with pytest.raises(
            ValueError, match=r"weights are \(.*; they must be at least 0 and sum to"
        ):
            GaussianMixtureDenoiser(VP, weights)

"""SA-Solver, beyond the contract of all samplers."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from samplers import Grid, NoiseSchedule, Sampler, integrate
from samplers.ddim import DDIM
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.sa_solver import SASolver, _moments
from samplers.testing import SlopeRange, measured_order
from samplers.timesteps import LogSNR, Trailing
from tests.covering import covering
from tests.samplers.cases import CANCELLING, EDM, FLOW, VP

START = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[None]


def solver(**fields: Any) -> SASolver:
    return SASolver.model_validate(fields)


@pytest.mark.parametrize("z", [1e-4, 0.3, 0.999, 1.0, 6.0, 50.0])
def test_moments_are_their_integrals(z: float) -> None:
    for k, moment in enumerate(_moments(z, 4)):
        exact, _ = quad(lambda v, k=k: z * np.exp(-z * (1 - v)) * v**k, 0, 1, epsabs=1e-14)
        assert moment == pytest.approx(exact, rel=1e-12)


def lagrange(nodes: Sequence[float], j: int, at: float) -> float:
    others = [node for k, node in enumerate(nodes) if k != j]
    return float(np.prod([(at - other) / (nodes[j] - other) for other in others]))


def adams(
    grid: Grid, i: int, x: Tensor, known: list[tuple[int, Tensor]], tau: float, z: Tensor
) -> Tensor:
    """Equation 14 or 17 of the paper from point i, with integrals by quadrature.

    ``known`` holds the predictions and the points at which they were made.
    """
    lam = grid.half_log_snr
    start, end = lam[i], lam[i + 1]
    nodes = [float(lam[k]) for k, _ in known]
    out = grid.sigma[i + 1] / grid.sigma[i] * np.exp(-(tau**2) * (end - start)) * x
    for j, (_, D) in enumerate(known):
        weight, _ = quad(
            lambda r, j=j: np.exp((1 + tau**2) * (r - end)) * lagrange(nodes, j, r), start, end
        )
        # sigma e^(-tau^2 lam) e^((1 + tau^2) lam) is alpha.
        out = out + (1 + tau**2) * grid.alpha[i + 1] * weight * D
    return out + grid.sigma[i + 1] * np.sqrt(1 - np.exp(-2 * tau**2 * (end - start))) * z


ORDERS = [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("schedule", "orders", "tau"),
    covering(product([VP, FLOW], ORDERS, [0.0, 0.7, 1.2]), tuple),
)
def test_runs_are_algorithm_one_of_the_paper(
    schedule: NoiseSchedule, orders: tuple[int, int], tau: float
) -> None:
    predictor, corrector = orders
    grid = schedule.grid(LogSNR(), 6, 0.95, 0.05)
    data = GaussianMixtureDenoiser(schedule)
    noise = torch.randn(
        6, *START.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    known: list[tuple[int, Tensor]] = []
    x, before = START, START
    for i in range(6):
        D = data(x, float(grid.t[i]))
        known.insert(0, (i, D))
        if i and corrector:
            x = adams(grid, i - 1, before, known[:corrector], tau, noise[i - 1])
        before = x
        x = adams(grid, i, x, known[:predictor], tau, noise[i])
    plan = solver(tau=tau, predictor_order=predictor, corrector_order=corrector).plan(grid)
    ours = integrate(plan, data, START, noise.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_without_noise_and_of_order_one_it_is_ddim() -> None:
    grid = VP.grid(Trailing(), 5)
    plan = solver(tau=0.0, predictor_order=1, corrector_order=0).plan(grid)
    np.testing.assert_allclose(plan.tables[:, 0, [0, 4, 5, 6]], DDIM().plan(grid).tables[:, 0])


def test_with_full_noise_and_of_order_one_it_is_ancestral() -> None:
    grid = EDM.grid(Trailing(), 5)
    plan = solver(tau=1.0, predictor_order=1, corrector_order=0).plan(grid)
    ancestral = DDIM(eta=1).plan(grid).tables
    np.testing.assert_allclose(plan.tables[:, 0, [0, 4, 5, 6]], ancestral[:, 0], atol=1e-14)


@pytest.mark.parametrize(
    ("sampler", "flow"),
    covering(
        product(
            CANCELLING,
            [SlopeRange(VP, 1.0, 0.02), SlopeRange(FLOW, 0.99, 0.05), SlopeRange(EDM, 20.0, 0.05)],
        ),
        tuple,
    ),
)
def test_where_errors_cancel_they_still_fall_as_fast_as_declared(
    sampler: Sampler, flow: SlopeRange
) -> None:
    """Slopes range from 1.7 to 4.2 as the error changes sign, so only a lower bound is checked."""
    assert measured_order(sampler, flow) > sampler.convergence_order - 0.35


def test_from_exact_history_a_predictor_has_its_order() -> None:
    """A cold start hides order three: one step from exact predictions has the local order."""
    data = GaussianMixtureDenoiser(VP)
    for order in (1, 2, 3):
        found: list[float] = []
        for h in (0.02, 0.01):
            lam = -h * np.arange(3, -1, -1)
            t = VP.time_of_half_log_snr(lam)
            grid = Grid.on_times(VP, t, clean=False)
            at = [data.transport(START, float(t[0]), float(s)) for s in t]
            history = [data(x, float(s)) for x, s in zip(at, t, strict=True)]
            table = solver(tau=0.0, predictor_order=order, corrector_order=0).plan(grid).tables[2]
            columns = [at[2], history[1], history[0], 0 * START, history[2]]
            landed = sum(c * v for c, v in zip(table[0, :5], columns, strict=True))
            found.append(float((landed - at[3]).abs().max()))
        [slope] = [np.log2(a / b) for a, b in pairwise(found)]
        assert abs(slope - (order + 1)) < 0.3, (order, slope)


def test_rounded_weights_overshoot_where_few_steps_are_even_in_log_snr() -> None:
    data = GaussianMixtureDenoiser(VP)
    grid = VP.grid(LogSNR(), 8)
    exact = data.transport(START, float(grid.t[0]), 1e-6)
    missed = [
        float((integrate(solver(tau=0.0, second_order=w).plan(grid), data, START) - exact).norm())
        for w in ("exact", "rounded")
    ]
    assert missed[1] > 3 * missed[0]


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_rounded_weights_are_those_of_the_authors_code(tau: float) -> None:
    """The difference from the exact weights moves from the previous prediction to the newest."""
    grid = VP.grid(LogSNR(), 8)
    lam = np.log(grid.alpha[:5] / grid.sigma[:5])
    exact, rounded = (
        solver(tau=tau, predictor_order=2, corrector_order=0, second_order=w).plan(grid).tables[3]
        for w in ("exact", "rounded")
    )
    c, h = 1 + tau**2, lam[4] - lam[3]
    more = c * grid.alpha[4] * (h**2 / 2 - (c * h - 1 + np.exp(-c * h)) / c**2) / (lam[3] - lam[2])
    # Columns: x, the three previous predictions (latest first), the newest one, noise and one.
    moved = [0, -more, 0, 0, more, 0, 0]
    np.testing.assert_allclose(rounded[0] - exact[0], moved, rtol=1e-8, atol=1e-10)


def test_rounded_weights_are_not_taken_at_pure_noise() -> None:
    grid = FLOW.grid(Trailing(), 4)
    exact, rounded = (
        solver(tau=0.5, second_order=w).plan(grid).tables for w in ("exact", "rounded")
    )
    np.testing.assert_array_equal(exact[0], rounded[0])
    assert np.abs(rounded).max() < 10

"""Momentum samplers, beyond the contract of all samplers."""

from itertools import pairwise, product
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import Grid, Sampler, integrate
from samplers.ddim import DDIM
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import GHVB, HB, MomentumSampler, Nesterov
from samplers.timesteps import LogSNR, Trailing
from tests.covering import covering, few_of, spread
from tests.samplers.cases import EDM, SCHEDULES, VP

Kind: TypeAlias = type[HB] | type[Nesterov] | type[GHVB]
KINDS: tuple[Kind, ...] = (HB, Nesterov, GHVB)
each_kind = pytest.mark.parametrize("kind", KINDS)
GAMMA = (1, 1 / 2, 5 / 12, 3 / 8, 251 / 720)
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    5: (1901 / 720, -2774 / 720, 2616 / 720, -1274 / 720, 251 / 720),
}


def published_ghvb(v: list[Tensor], order: int, beta: float) -> Tensor:
    """Algorithm 2 with its printed coefficients; ``v`` is newest first."""
    b = beta
    rows = {
        1: (2 * b,),
        2: (2 + b, -(2 - b)),
        3: (18 + 5 * b, -(24 - 8 * b), 6 - b),
        4: (46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)),
        5: (1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b),
    }
    row = rows[order]
    scale = {1: 2, 2: 2, 3: 12, 4: 24, 5: 720}[order] * beta
    return torch.stack([c / scale * one for c, one in zip(row, v, strict=False)]).sum(0)


def transcribed(name: str, grid: Grid, order: int, beta: float, x: Tensor) -> Tensor:
    """The paper's loops, with eps and v kept in lists."""
    data = GaussianMixtureDenoiser(VP)
    eps: list[Tensor] = []
    v: list[Tensor] = []
    points = list(zip(grid.t.tolist(), grid.alpha.tolist(), grid.sigma.tolist(), strict=True))
    for (t, a, s), (_, a2, s2) in pairwise(points):
        eps.insert(0, (x - a * data(x, t)) / s)
        count = min(order, len(eps))
        pushed = sum(w * e for w, e in zip(ADAMS_BASHFORTH[count], eps, strict=False))
        before = v[0] if v else eps[0]
        if name == "ghvb":
            v.insert(0, (1 - beta) * before + beta * eps[0])
            along: Any = published_ghvb(v, count, beta)
        else:
            v.insert(0, (1 - beta) * before + beta * pushed)
            along = v[0] if name == "hb" else (1 - beta) * v[0] + beta * pushed
        x = a2 * (x / a + (s2 / a2 - s / a) * along)
    return x


@pytest.mark.parametrize(
    ("kind", "order", "beta"),
    covering(product(KINDS, [1, 2, 3, 4, 5], [1.0, 0.8, 0.3]), tuple, together=2),
)
def test_runs_are_those_of_the_papers_loops(kind: Kind, order: int, beta: float) -> None:
    grid = VP.grid(Trailing(), 9)
    start = torch.linspace(-1.6, 1.6, 7, dtype=torch.float64)[None]
    sampler = kind(order=float(order), beta=beta)
    ours = integrate(sampler.plan(grid), GaussianMixtureDenoiser(VP), start)
    theirs = transcribed(sampler.name, grid, order, beta, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "schedule"), spread(KINDS, few_of(SCHEDULES, ["zero_snr", "flow_shifted", "edm"]))
)
def test_order_one_is_ddim(kind: Kind, schedule: str) -> None:
    grid = SCHEDULES[schedule].grid("trailing", 9)
    np.testing.assert_allclose(
        kind(order=1.0).plan(grid).tables, DDIM().plan(grid).tables, rtol=0, atol=1e-12
    )


def test_below_order_one_generalised_heavy_ball_is_heavy_ball() -> None:
    grid = VP.grid(LogSNR(), 9)
    one, other = HB(order=0.8).plan(grid), GHVB(order=0.8).plan(grid)
    np.testing.assert_allclose(one.tables, other.tables, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", ["constant", "variable"])
@pytest.mark.parametrize("order", few_of([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 5.0]))
def test_with_a_beta_of_one_all_are_adams_bashforth(order: float, weights: Any) -> None:
    grid = VP.grid(LogSNR(), 9)
    one, *others = (kind(order=order, weights=weights).plan(grid).tables for kind in KINDS)
    for other in others:
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-10)


@each_kind
def test_a_fraction_and_a_beta_say_the_same(kind: Kind) -> None:
    grid = VP.grid(LogSNR(), 6)
    said = ({"order": 3.8}, {"order": 4, "beta": 0.8}, {"order": 3.8, "beta": 0.8})
    one, *others = (kind.model_validate(fields).plan(grid).tables for fields in said)
    for other in others:
        np.testing.assert_array_equal(other, one)


@each_kind
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"order": 3.8, "beta": 0.5},
            "beta is 0.5 and order is 3.8, which implies a beta of 0.8; "
            "give a whole order with beta, or the order alone.",
        ),
        ({"order": 3.05}, "order is 3.05, which implies a beta of 0.05; at least 0.1 is allowed."),
        (
            {"order": 3.5, "weights": "variable"},
            "weights is 'variable' and beta is 0.5; variable weights need a beta of at least 0.8.",
        ),
        ({"order": 5.1}, "less than or equal to 5"),
        ({"order": 0.05}, "greater than or equal to 0.1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: Kind, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind.model_validate(fields)


@each_kind
def test_slots_are_no_more_than_the_history_that_is_used(kind: Kind) -> None:
    grid = VP.grid(LogSNR(), 6)
    slots = {order: kind(order=order).plan(grid).slots for order in (0.8, 1.0, 3.8, 4.0, 4.8)}
    velocity = 0 if kind is GHVB else 1
    assert slots == {0.8: 2, 1.0: 1, 3.8: 4 + velocity, 4.0: 4, 4.8: 5 + velocity}


def even_tables(sampler: Sampler, steps: int) -> tuple[Grid, Any]:
    """A plan over even steps of sigma of length one, where alpha is 1."""
    grid = Grid.on_times(EDM, np.arange(steps + 20.0, 19.0, -1.0), clean=False)
    return grid, sampler.plan(grid).tables


@pytest.mark.parametrize(("beta", "order"), spread([1.0, 0.8, 0.4], [1, 2, 3, 4, 5]))
def test_order_is_kept_on_even_steps_with_a_warm_history(order: int, beta: float) -> None:
    """The flow d y / d s = cos(s) y, solved backwards from a history that lies on its solution."""
    sampler = GHVB(order=float(order), beta=beta)
    found: list[float] = []
    counts = (40, 80, 160)
    for steps in counts:
        reach = 3.0 / steps
        s = 4.0 - reach * np.arange(-400, steps + 1)
        exact, velocity = np.exp(np.sin(s)), np.zeros(len(s))
        slope = np.cos(s) * exact
        for n in range(len(s)):
            before = velocity[n - 1] if n else slope[0]
            velocity[n] = (1 - beta) * before + beta * slope[n]
        weights = last_weights(sampler)
        y, v = exact[400], list(velocity[399 : 399 - order : -1])
        farthest = 0.0
        for n in range(400, len(s) - 1):
            v.insert(0, (1 - beta) * v[0] + beta * np.cos(s[n]) * y)
            y -= reach * sum(w * one for w, one in zip(weights, v, strict=False))
            farthest = max(farthest, abs(y - exact[n + 1]))
        found.append(farthest)
    slope_found = -np.polyfit(np.log(counts), np.log(found), 1)[0]
    assert abs(slope_found - order) < 0.15, (slope_found, found)


def last_weights(sampler: GHVB) -> Any:
    """Weights of the velocities in a step over even steps, newest first, derived from a plan."""
    grid, tables = even_tables(sampler, 12)
    r, beta, i = sampler.slopes, sampler.damping, 10
    moved = of_slopes(grid, tables, i)[0]
    # A unit of the k-th velocity moves x against the step; the newest is beta of the new slope.
    kept = list(-moved[1:-1])
    newest = -moved[-1] / beta
    weights = [newest, *kept]
    if beta < 1:
        # The newest also contains 1 - beta times the one before.
        weights[1] -= (1 - beta) * newest
    return weights[:r]


def of_slopes(grid: Grid, tables: Any, i: int) -> Any:
    """Stage i as a matrix from (x, history as slopes, new slope) to (x, history as slopes)."""
    K = tables.shape[1]
    sigma, sigma_next = grid.sigma[i], grid.sigma[i + 1]
    columns = np.zeros((K + 1, K + 1))
    columns[:, 0] = 1
    columns[1:, 1:] = -sigma * np.eye(K)
    columns[0, 0] = 1
    # x, then x - sigma slope for each slot, then D = x - sigma slope of the new evaluation.
    into = columns
    out = tables[i][:, : K + 1] @ into
    out[1:] = (out[0] - out[1:]) / sigma_next
    return out


LIMITS: list[tuple[MomentumSampler, float]] = [
    (GHVB(order=1.0), 2.0),
    (GHVB(order=2.0), 1.0),
    (GHVB(order=3.0), 6 / 11),
    (GHVB(order=4.0), 0.3),
    (HB(order=0.8), 3.0),
    (HB(order=1.8), 1.5),
    (HB(order=2.8), 9 / 11),
    (HB(order=3.8), 0.45),
    (GHVB(order=0.8), 3.0),
    (GHVB(order=1.8), 1.2),
    (GHVB(order=2.8), 0.643),
    (GHVB(order=3.8), 0.353),
]


@pytest.mark.parametrize(
    ("sampler", "limit"), LIMITS, ids=[f"{one.name}-{one.order}" for one, _ in LIMITS]
)
def test_real_axis_stability_limits_are_the_papers(sampler: MomentumSampler, limit: float) -> None:
    """Eigenvalues of a stage on d y / d s = lam y, where steps decrease s: lam h > 0."""
    grid, tables = even_tables(sampler, 12)
    linear = of_slopes(grid, tables, 10)

    def radius(lam: float) -> float:
        move = linear[:, :-1].copy()
        move[:, 0] += lam * linear[:, -1]
        return float(np.abs(np.linalg.eigvals(move)).max())

    assert radius(0.99 * limit) <= 1 + 1e-12
    assert radius(1.01 * limit) > 1

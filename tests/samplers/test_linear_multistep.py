"""Weights of slopes, and the start of runs with variable weights."""

from typing import Any

import numpy as np
import pytest
import torch

from samplers import Grid, NoiseSchedule, Plan, integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import GHVB, HB
from samplers.linear_multistep import Line, mean_of_interpolant, of_differences
from samplers.testing import SlopeRange, check_order
from tests.covering import few_of, spread
from tests.samplers.cases import EDM, FLOW, VP

UNEVEN = np.array([9.0, 8.0, 6.5, 5.8, 4.9, 4.4, 3.6, 3.3])


def path(plan: Plan, degree: int) -> np.ndarray[Any, Any]:
    """x at the points of a plan where alpha is 1 and the slope is a power of sigma alone."""
    found = [0.0]
    state = np.zeros(plan.slots)
    for table, sigma in zip(plan.tables, plan.sigma[:-1], strict=True):
        denoised = state[0] - sigma * sigma**degree
        state = table @ np.array([*state, denoised, 0, 1])
        found.append(state[0])
    return np.array(found)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_mean_of_a_polynomial_through_as_many_points_is_exact(count: int) -> None:
    nodes, start, end = UNEVEN[:count], 7.0, 2.0
    weights = mean_of_interpolant(nodes, start, end)
    for power in range(count):
        mean = (end ** (power + 1) - start ** (power + 1)) / (power + 1) / (end - start)
        assert weights @ nodes**power == pytest.approx(mean, rel=1e-9)


def test_backward_differences_are_alternating_binomials() -> None:
    np.testing.assert_array_equal(of_differences(np.array([0.0, 0, 0, 1])), [1, -3, 3, -1])


@pytest.mark.parametrize("order", few_of([1, 2, 3, 4, 5], [1, 3, 5]))
def test_variable_weights_of_even_steps_are_the_constant_ones(order: int) -> None:
    line = Line.of_noise(Grid.on_times(EDM, np.linspace(9, 2, 8), clean=False))
    one, other = (line.mean_weights(5, order, kind) for kind in ("constant", "variable"))
    np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(("kind", "order"), spread([HB, GHVB], [1, 2, 3, 4, 5]))
def test_variable_weights_follow_polynomials_on_uneven_steps_from_the_start(
    kind: type[HB] | type[GHVB], order: int
) -> None:
    """Steps made with too few slopes are repeated once there are enough."""
    grid = Grid.on_times(EDM, UNEVEN, clean=False)
    plan = kind(order=float(order), weights="variable").plan(grid)
    for degree in range(order):
        exact = (UNEVEN ** (degree + 1) - UNEVEN[0] ** (degree + 1)) / (degree + 1)
        found = path(plan, degree)
        np.testing.assert_allclose(found[degree + 1 :], exact[degree + 1 :], rtol=1e-10)
        if degree:
            assert abs(found[1] - exact[1]) > 1e-3 * abs(exact[1])


def test_steps_are_not_redone_where_their_sizes_differ_much() -> None:
    grid = Grid.on_times(EDM, np.array([64.0, 16.0, 4.0, 1.0, 0.25]), clean=False)
    line = Line.of_noise(grid)
    slopes = [*np.eye(4)]
    assert line.redone(1, slopes[:2]).any()
    assert not line.redone(2, slopes[:3]).any()
    assert not line.redone(3, slopes).any()


def test_a_point_without_signal_is_not_seen() -> None:
    """In sigma / alpha, pure noise is infinitely far away."""
    line = Line.of_noise(FLOW.grid("trailing", 5))
    assert line.s[0] == np.inf
    two, three = (line.mean_weights(2, count, "variable") for count in (2, 3))
    np.testing.assert_array_equal(three, [*two, 0])
    assert not line.redone(2, [*np.eye(3)]).any()


@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_scales_differ_on_flow_matching_alone(schedule: Any) -> None:
    grid = schedule.grid("trailing", 5)
    np.testing.assert_array_equal(Line.of_schedule(grid).s, Line.of_noise(grid).s)
    flow = FLOW.grid("trailing", 5)
    np.testing.assert_array_equal(Line.of_schedule(flow).s, flow.sigma)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_a_move_of_x_takes_past_slopes_with_it(schedule: Any) -> None:
    """Otherwise the distance from a constant prediction would not shrink in proportion to sigma."""
    grid = schedule.grid("logsnr", 6, t_end=0.1)
    plan = GHVB(order=4.0).plan(grid)
    target = torch.zeros(1, 1, dtype=torch.float64)
    start = torch.ones(1, 1, dtype=torch.float64)
    moved = Plan(plan.t, plan.alpha, plan.sigma, plan.tables.copy(), plan.step, plan.start_scale)
    moved.tables[2, 0, -1] += 1.0
    plain = integrate(plan, lambda _x, _t: target, start)
    shifted = integrate(moved, lambda _x, _t: target, start)
    expected = grid.sigma[-1] / grid.sigma[3]
    assert float(shifted - plain) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("schedule", "t_start"), [(FLOW, 0.9), (EDM, 5.0)], ids=["flow", "edm"])
def test_variable_weights_keep_their_order_from_a_start_at_little_noise(
    schedule: NoiseSchedule, t_start: float
) -> None:
    """Where the prediction changes in the first step, which has order 1 until it is redone."""
    check_order(GHVB(order=4.0, weights="variable"), SlopeRange(schedule, t_start, 0.05))


def test_variable_weights_pay_at_many_steps_alone() -> None:
    data = GaussianMixtureDenoiser(VP)
    x = torch.linspace(-1.6, 1.6, 17, dtype=torch.float64)[None]
    exact = data.transport(x, 1.0, 0.02)

    def error(weights: Any, steps: int) -> float:
        plan = GHVB(order=3.8, weights=weights).plan(VP.grid("logsnr", steps, 1.0, 0.02))
        return float((integrate(plan, data, x) - exact).abs().max())

    assert error("variable", 20) > 2 * error("constant", 20)
    assert error("variable", 160) < 0.5 * error("constant", 160)

"""Declared orders compared with slopes measured on a Gaussian mixture, whose flow is known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, Plan, Sampler, advance
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import GHVB
from samplers.testing import SLOPE_STEPS, SlopeRange, check_order, measured_order
from samplers.unipc import UniPC
from tests.samplers.cases import (
    CANCELLING,
    COLD,
    DISTILLED,
    EACH_KIND,
    EDM,
    FAINT,
    FLOW,
    SCHEDULES,
    VARIANTS,
    VP,
    label,
    over_schedules,
    said,
)

# Lowering the order at the end matters only for few steps, and would hide the slope. The leading
# errors of some SA-Solvers nearly cancel and give no single slope: test_sa_solver bounds them. Some
# settings of DPM-Solver-v3 start too coarsely: test_dpm_solver_v3 measures them with smaller first
# steps. Where the leading error is small, test_leading_errors knows its factor.
SOLVERS = [
    one
    for one in VARIANTS
    if one.convergence_order > 0
    and not getattr(one, "lower_order_final", False)
    and one not in CANCELLING
    and one not in (*COLD, *FAINT)
]
CELLS = over_schedules(SOLVERS, EACH_KIND, EACH_KIND)
RANGES = {VP: (1.0, 0.02), FLOW: (0.99, 0.05), EDM: (20.0, 0.05)}


def evaluates_at_each_point(sampler: Sampler) -> bool:
    """Whether a sampler evaluates exactly once at each point of the grid."""
    return sampler.evaluations(7) == sampler.steps_taken(7) == 7


def errors_together(plans: Sequence[Plan], flow: SlopeRange) -> list[float]:
    """Errors of runs of different samplers against the exact flow, as rows of one batch."""
    schedule, t_start, t_end = flow
    data = GaussianMixtureDenoiser(schedule)
    reach = 1.6 * float(data.spread(t_start).max())
    x = torch.linspace(-reach, reach, 17, dtype=torch.float64)
    K = max(plan.slots for plan in plans)
    tables = torch.zeros(plans[0].evaluations, len(plans), K, K + 3, dtype=torch.float64)
    for row, plan in enumerate(plans):
        k, table = plan.slots, torch.from_numpy(plan.tables)
        assert np.array_equal(plan.t, plans[0].t)
        tables[:, row, :k, :k], tables[:, row, :k, K:] = table[:, :, :k], table[:, :, k:]
    columns = torch.zeros(len(plans), K + 2, len(x), dtype=torch.float64)
    columns[:, 0] = x
    for t, table in zip(plans[0].t[:-1], tables, strict=True):
        columns[:, K] = data(columns[:, 0], float(t))
        columns[:, :K] = advance(columns, table)
    missed = columns[:, 0] - data.transport(x, t_start, t_end)
    return missed.abs().amax(1).tolist()


@pytest.mark.parametrize("name", EACH_KIND)
def test_error_falls_with_the_declared_power_of_the_step(name: str) -> None:
    """For all samplers that evaluate at the same points, at once."""
    schedule = SCHEDULES[name]
    flow = SlopeRange(schedule, *RANGES[schedule])
    solvers = [one for one, on in CELLS if on is schedule and evaluates_at_each_point(one)]
    errors: list[list[float]] = []
    for steps in SLOPE_STEPS:
        grid = schedule.grid("logsnr", steps, *RANGES[schedule])
        errors.append(errors_together([one.plan(grid) for one in solvers], flow))
    slopes = -np.polyfit(np.log(SLOPE_STEPS), np.log(errors), 1)[0]
    astray = {
        label(one): f"{slope:.2f}, not {one.convergence_order}"
        for one, slope in zip(solvers, slopes, strict=True)
        if abs(slope - one.convergence_order) >= 0.25
    }
    assert not astray


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [cell for cell in CELLS if not evaluates_at_each_point(cell[0])],
    ids=said,
)
def test_error_falls_with_the_declared_power_where_a_step_has_points_of_its_own(
    sampler: Sampler, schedule: NoiseSchedule
) -> None:
    check_order(sampler, SlopeRange(schedule, *RANGES[schedule]))


@pytest.mark.parametrize(
    "sampler",
    [UniPC(order=3, lower_order_final=False), GHVB(order=4.8, weights="variable")],
    ids=lambda sampler: sampler.name,
)
def test_orders_above_three_do_not_show_from_low_noise(sampler: Sampler) -> None:
    """The first steps, of lower order, are then made where the prediction changes."""
    assert 3.2 < measured_order(sampler, SlopeRange(FLOW, 0.8, 0.1)) < 3.8


def test_every_sampler_that_solves_the_flow_is_measured() -> None:
    assert {type(one) for one in SOLVERS} >= {
        type(one) for one in VARIANTS if not one.stochastic and one.name not in DISTILLED
    }

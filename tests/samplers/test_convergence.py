"""Declared orders against slopes measured on a Gaussian mixture, whose flow is known."""

import pytest

from samplers import NoiseSchedule, Sampler
from samplers.heavy_ball import GHVB
from samplers.testing import Flow, check_order, measured_order
from samplers.unipc import UniPC
from tests.samplers.cases import (
    CANCELLING,
    COLD,
    DISTILLED,
    EACH_KIND,
    EDM,
    FAINT,
    FLOW,
    VARIANTS,
    VP,
    over_schedules,
    said,
)

# Lowering the order at the end is a matter of few steps, and would hide the slope. Leading errors
# of some SA-Solvers all but cancel and give no one slope: test_sa_solver bounds those. Some
# of DPM-Solver-v3 start too coarsely: test_dpm_solver_v3 measures them from smaller first steps.
# Where the leading error is faint, test_leading_errors knows its factor.
SOLVERS = [
    one
    for one in VARIANTS
    if one.convergence_order > 0
    and not getattr(one, "lower_order_final", False)
    and one not in CANCELLING
    and one not in (*COLD, *FAINT)
]


RANGES = {VP: (1.0, 0.02), FLOW: (0.99, 0.05), EDM: (20.0, 0.05)}


@pytest.mark.parametrize(
    ("sampler", "schedule"), over_schedules(SOLVERS, EACH_KIND, EACH_KIND), ids=said
)
def test_error_falls_with_the_declared_power_of_the_step(
    sampler: Sampler, schedule: NoiseSchedule
) -> None:
    check_order(sampler, Flow(schedule, *RANGES[schedule]))


@pytest.mark.parametrize(
    "sampler",
    [UniPC(order=3, lower_order_final=False), GHVB(order=4.8, weights="variable")],
    ids=lambda sampler: sampler.name,
)
def test_orders_above_three_do_not_show_from_low_noise(sampler: Sampler) -> None:
    """The first steps, of lower order, are then made where the prediction moves."""
    assert 3.2 < measured_order(sampler, Flow(FLOW, 0.8, 0.1)) < 3.8


def test_every_sampler_that_solves_the_flow_is_measured() -> None:
    assert {type(one) for one in SOLVERS} >= {
        type(one) for one in VARIANTS if not one.stochastic and one.name not in DISTILLED
    }

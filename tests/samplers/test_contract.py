"""The contract of every registered sampler, including those of installed packages."""

from typing import TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from samplers import SAMPLERS, SPACINGS, NoiseSchedule, Plan, Sampler, advance, integrate
from samplers.gaussian import GaussianDenoiser
from samplers.testing import (
    check_description,
    check_evaluations,
    check_moves,
    check_noise,
    check_one_step,
    check_plan,
)
from tests.samplers.cases import (
    DISCRETE,
    DISTILLED,
    EACH_KIND,
    FEW_VARIANTS,
    LINEAR_PAIRS,
    NONLINEAR,
    PAIRS,
    STEPS,
    VARIANTS,
    VP,
    each_kind,
    fields_in_pairs,
    grid_unless_refused,
    label,
    layouts,
    may_refuse,
    over_schedules,
    said,
    spacing_named,
)

Cell: TypeAlias = tuple[Sampler, NoiseSchedule]

MEAN, DEVIATION = 0.7, 0.6

# Distilled models are not denoisers, and a nonlinear stage has no moments in closed form: see
# test_lcm, test_tcd and test_score_sde_pc.
SOLVERS = [one for one in VARIANTS if one.name not in DISTILLED]
DETERMINISTIC = [one for one in SOLVERS if not one.stochastic]
STOCHASTIC = [one for one in SOLVERS if one.stochastic and one.name not in NONLINEAR]


def plan_of(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> Plan:
    return sampler.plan(schedule.grid(spacing_named(sampler.default_spacing), steps))


def moments(plan: Plan, deviation: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of slot 0 at each point for data N(MEAN, deviation^2), in closed form.

    The exact denoiser of such data is linear in x and so are the tables, so the state stays
    Gaussian and its first two moments follow from the matrices.
    """
    K = plan.slots
    mean, covariance = np.zeros(K), np.zeros((K, K))
    mean[0] = plan.alpha[0] * MEAN
    covariance[0, 0] = (plan.alpha[0] * deviation) ** 2 + plan.sigma[0] ** 2
    means, variances = [mean[0]], [covariance[0, 0]]
    for table, alpha, sigma in zip(plan.tables, plan.alpha[:-1], plan.sigma[:-1], strict=True):
        total = (alpha * deviation) ** 2 + sigma**2
        move = table[:, :K].copy()
        move[:, 0] += table[:, K] * alpha * deviation**2 / total
        mean = move @ mean + table[:, K] * sigma**2 * MEAN / total + table[:, K + 2]
        covariance = move @ covariance @ move.T + np.outer(table[:, K + 1], table[:, K + 1])
        means.append(mean[0])
        variances.append(covariance[0, 0])
    return np.array(means), np.array(variances)


def test_names_and_texts_are_there_once() -> None:
    for registry in (SAMPLERS, SPACINGS):
        names = [kind.model_fields["name"].default for kind in registry]
        assert len(set(names)) == len(names)
        for kind in registry:
            check_description(kind)


@each_kind(cells=PAIRS)
def test_every_plan_is_finite_and_lands_on_the_clean_picture(cells: list[Cell]) -> None:
    for sampler, schedule in cells:
        for spacing, steps in layouts(sampler, schedule):
            grid = grid_unless_refused(schedule, spacing, steps)
            if grid is None:
                assert may_refuse(spacing, schedule)
                continue
            where = f"{label(sampler)} on {said(schedule)}, {label(spacing)}, {steps} steps"
            plan = sampler.plan(grid)
            check_plan(plan, where)
            assert plan.t[-1] == grid.t[-1], where


@each_kind(variants=FEW_VARIANTS)
def test_evaluations_are_as_declared(variants: list[Sampler]) -> None:
    for sampler in variants:
        for steps in STEPS:
            check_evaluations(sampler, DISCRETE, steps)
        # The first and last steps may take other numbers of evaluations.
        full = np.median(np.bincount(plan_of(sampler, DISCRETE, 20).step))
        assert full == sampler.evaluations_per_step, label(sampler)


def test_the_denoiser_is_told_the_times_of_the_plan() -> None:
    for sampler in FEW_VARIANTS:
        plan = plan_of(sampler, DISCRETE, 5)
        told: list[float] = []
        integrate(
            plan,
            lambda x, t, told=told: (told.append(t), x)[1],
            torch.ones(1, 1),
            lambda _: torch.zeros(1, 1),
        )
        assert told == plan.t[:-1].tolist(), label(sampler)


@each_kind(variants=FEW_VARIANTS)
def test_noise_is_drawn_exactly_when_declared(variants: list[Sampler]) -> None:
    for sampler in variants:
        check_noise(sampler, DISCRETE)


@each_kind(cells=PAIRS)
def test_one_step_to_zero_gives_the_denoised_picture(cells: list[Cell]) -> None:
    for sampler, schedule in cells:
        check_one_step(sampler, schedule)


@each_kind(cells=LINEAR_PAIRS)
def test_point_data_has_its_exact_marginal_at_every_level(cells: list[Cell]) -> None:
    for sampler, schedule in cells:
        plan = plan_of(sampler, schedule, 12)
        means, variances = moments(plan, 0.0)
        # LCM's boundary condition keeps up to 1e-5 of x.
        tolerance = 2e-5 if sampler.name == "lcm" else 1e-9 * plan.sigma[0] ** 2
        where = f"{label(sampler)} on {said(schedule)}"
        np.testing.assert_allclose(means, plan.alpha * MEAN, atol=tolerance, err_msg=where)
        np.testing.assert_allclose(variances, plan.sigma**2, atol=tolerance, err_msg=where)


@each_kind(cells=over_schedules(DETERMINISTIC, EACH_KIND, EACH_KIND))
def test_a_point_moved_before_a_step_stays_moved(cells: list[Cell]) -> None:
    for sampler, schedule in cells:
        check_moves(sampler, schedule)


@each_kind(cells=over_schedules(fields_in_pairs(STOCHASTIC), EACH_KIND, EACH_KIND))
def test_stochastic_samplers_approach_the_variance_of_gaussian_data(cells: list[Cell]) -> None:
    spacing = spacing_named("logsnr")
    for sampler, schedule in cells:
        few, many = (
            abs(moments(sampler.plan(schedule.grid(spacing, n)), DEVIATION)[1][-1] - 0.36)
            for n in (50, 100)
        )
        # The error falls at least in proportion to the step size, down to the variance that is lost
        # in the last jump from the cleanest trained level: 1.1e-4 on vp_linear.
        where = f"{label(sampler)} on {said(schedule)}"
        assert many < max(0.6 * few, 2e-4), where
        assert many < 0.08, where


@each_kind(variants=fields_in_pairs(STOCHASTIC))
def test_drawn_runs_have_the_moments_that_the_tables_say(variants: list[Sampler]) -> None:
    runs = 40_000
    for sampler in variants:
        plan = plan_of(sampler, VP, 8)
        generator = torch.Generator().manual_seed(7)

        def noise(stage: int = 0, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(1, runs, generator=generator, dtype=torch.float64)

        alpha, sigma = plan.alpha[0], plan.sigma[0]
        start = alpha * (MEAN + DEVIATION * noise()) + sigma * noise()
        landed = integrate(plan, GaussianDenoiser(VP, MEAN, DEVIATION), start, noise)
        means, variances = moments(plan, DEVIATION)
        # Five standard errors of either estimate: one false alarm in 900,000 seeds.
        mean_error = (variances[-1] / runs) ** 0.5
        assert abs(float(landed.mean()) - means[-1]) < 5 * mean_error, label(sampler)
        variance_error = variances[-1] * (2 / runs) ** 0.5
        assert abs(float(landed.var()) - variances[-1]) < 5 * variance_error, label(sampler)


def test_company_never_changes_a_result() -> None:
    plans = [plan_of(sampler, DISCRETE, 6) for sampler in VARIANTS]
    K = max(plan.slots for plan in plans)
    generator = torch.Generator().manual_seed(3)
    columns = torch.randn(len(plans), K + 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    tables = torch.zeros(len(plans), K, K + 3, dtype=torch.float64)
    for row, plan in enumerate(plans):
        k, table = plan.slots, torch.from_numpy(plan.tables[4])
        tables[row, :k, :k], tables[row, :k, K:] = table[:, :k], table[:, k:]
    together = advance(columns, tables)
    for row, plan in enumerate(plans):
        k = plan.slots
        own = torch.cat([columns[row : row + 1, :k], columns[row : row + 1, K:]], 1)
        alone = advance(own, torch.from_numpy(plan.tables[4])[None])
        torch.testing.assert_close(together[row : row + 1, :k], alone, rtol=1e-13, atol=1e-13)
        assert not together[row, k:].any()


def test_parameters_are_frozen_and_strange_ones_refused() -> None:
    for kind in SAMPLERS:
        with pytest.raises(ValueError, match="frozen"):
            setattr(kind.model_validate({}), "name", "other")  # noqa: B010
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            kind.model_validate({"strength_of_coffee": 3})
